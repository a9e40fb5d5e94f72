"""The finetuning commands: each makes a `Method` of its flags and starts a `Run`."""
