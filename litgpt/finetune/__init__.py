"""The finetuning commands: each turns its flags into a `Method` and calls the one loop."""
