"""`litgpt serve`: models and adapters behind OpenAI's HTTP API, with a chat page."""
