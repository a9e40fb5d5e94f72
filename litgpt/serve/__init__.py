"""`litgpt serve`: models and adapters behind OpenAI's HTTP interface, and a page to chat."""
