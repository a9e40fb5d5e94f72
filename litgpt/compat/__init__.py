"""LitGPT's Python interface where it needs the upper floors. The other rooms import it by name only, on first use."""
