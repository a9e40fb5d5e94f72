"""What `litgpt COMMAND -h` shows beside the help of the options: which options, two examples, and the page."""

IMPORTANT = """
    tasks vs port host api_key adapters prompt prompts out objective list show sample rows json csv plot
    sys_prompt max_new_tokens temperature top_k top_p stop num_samples
    data method preference.loss preference.beta preference.sft_weight preference.reference out_dir
    optimizer.lr train.epochs train.max_seq_length train.global_batch_size train.micro_batch_size
    initial_checkpoint_dir tokenizer_dir model_config
    lora_r lora_targets quantize config resume dry_run overwrite devices
    limit exact_match num_fewshot batch_size fail_if_drop apply_chat_template log_samples
    base precision seed max_batch timeout access_token multiline
""".split()  # `-h` shows the first of these that a command has

PLACEHOLDERS = {  # of words without a flag
    "checkpoint_dir": "MODEL",
    "draft_model_checkpoint_dir": "DRAFT_MODEL",
    "target_model_checkpoint_dir": "MODEL",
    "model_name": "MODEL",
    "repo_id": "ORG/NAME",
    "output_dir": "FOLDER",
    "command": "COMMAND ...",
    "finetune": "MODEL ...",
    "words": "WORD ...",
    "files": "FILE ...",
    "dirs": "FOLDER ...",
    "run": "RUN",
    "other": "OTHER",
}

EXAMPLES = {  # command: two command lines
    "finetune_lora": ("finetune lora Qwen/Qwen3-0.6B --data support.csv", "finetune lora --config pico/lora"),
    "finetune_full": ("finetune full Qwen/Qwen3-0.6B --data support.csv", "finetune full --config llama-3.2-1B/full"),
    "finetune_adapter": (
        "finetune adapter Qwen/Qwen3-0.6B --data support.csv",
        "finetune adapter pico --data support.csv --train.epochs 1",
    ),
    "finetune_adapter_v2": (
        "finetune adapter_v2 Qwen/Qwen3-0.6B --data support.csv",
        "finetune adapter_v2 pico --data support.csv --train.epochs 1",
    ),
    "finetune_dpo": (
        "finetune dpo out/support/final --data pairs.jsonl",
        "finetune dpo Qwen/Qwen3-0.6B --data pairs.jsonl --preference.loss ipo",
    ),
    "finetune_kto": (
        "finetune kto out/support/final --data labels.jsonl",
        "finetune kto Qwen/Qwen3-0.6B --data labels.csv --preference.beta 0.3",
    ),
    "finetune_orpo": (
        "finetune orpo Qwen/Qwen3-0.6B --data pairs.jsonl",
        "finetune orpo Qwen/Qwen3-0.6B --data pairs.jsonl --method full",
    ),
    "finetune_simpo": (
        "finetune simpo out/final --data pairs.jsonl --preference.beta 2",
        "finetune simpo Qwen/Qwen3-0.6B --data pairs.jsonl --preference.gamma 1",
    ),
    "finetune_cpo": (
        "finetune cpo out/support/final --data pairs.jsonl",
        "finetune cpo out/final --data pairs.jsonl --preference.sft_weight 0.5",
    ),
    "pretrain": (
        "pretrain pico --tokenizer_dir pico --data my-texts/*.txt",
        "pretrain --initial_checkpoint_dir Qwen/Qwen3-0.6B --data my-texts/*.txt",
    ),
    "recipes": ("recipes llama qlora", "recipes copy phi-2/lora my.yaml"),
    "plan": (
        "plan finetune lora Qwen/Qwen3-8B --data support.csv --gpu '24 GB'",
        "plan chat Qwen/Qwen3-8B --gpu H100",
    ),
    "download": ("download Qwen/Qwen3-0.6B", "download list llama 8b"),
    "chat": ("chat Qwen/Qwen3-0.6B", "chat out/finetune/lora/final --temperature 0.2"),
    "generate": (
        "generate Qwen/Qwen3-0.6B --prompt 'What do llamas eat?'",
        "generate out/finetune/lora/final --prompts questions.csv --out a.jsonl",
    ),
    "generate_speculatively": (
        "generate_speculatively Qwen/Qwen3-0.6B Qwen/Qwen3-8B",
        "generate_speculatively Qwen/Qwen3-0.6B Qwen/Qwen3-8B --speculative_k 5",
    ),
    "generate_tp": ("generate_tp Qwen/Qwen3-8B", "generate_tp Qwen/Qwen3-8B --devices 2 --prompt 'Hello'"),
    "serve": ("serve out/finetune/lora/final", "serve Qwen/Qwen3-0.6B --port 8001 --quantize bnb.nf4"),
    "evaluate": (
        "evaluate out/finetune/lora/final --vs base",
        "evaluate Qwen/Qwen3-0.6B --tasks hellaswag,arc_easy",
    ),
    "merge_lora": ("merge_lora out/finetune/lora/final", "merge_lora out/finetune/lora/final --out_dir merged"),
    "export": (
        "export out/finetune/lora/final --to ollama --type q4_k_m",
        "export out/finetune/lora/final --to hub me/my-model",
    ),
    "data_check": (
        "data check Qwen/Qwen3-0.6B --data support.csv",
        "data check Qwen/Qwen3-0.6B --data support.csv --list bad",
    ),
    "data_cache": ("data cache", "data cache clear"),
    "tokenizer_train": (
        "tokenizer train my-texts/*.txt",
        "tokenizer train my-texts/*.txt --vocab_size 4096 --out_dir my-tokenizer",
    ),
    "runs_list": ("runs", "runs out/finetune --plot losses.png"),
    "runs_watch": ("runs watch", "runs watch out/finetune"),
    "runs_diff": ("runs diff out/a out/b", "runs diff out/finetune/lora out/finetune/full"),
    "ctl": ("ctl out/finetune/lora lr 5e-5", "ctl out/finetune/lora sample 'What is 2 + 2?'"),
    "validate": ("validate out/finetune/lora/final", "validate out/*/final --precision 32-true"),
    "report": ("report out/finetune/lora", "report out/a out/b --out report.html"),
    "rerun": ("rerun out/finetune/lora", "rerun out/finetune/lora --out_dir out/again"),
    "verify_resume": (
        "verify-resume pico --data support.csv",
        "verify-resume full pico --data support.csv --steps 3",
    ),
    "doctor": ("doctor", "doctor --out_dir /data/runs"),
    "completion": ("completion bash >> ~/.bashrc", "completion fish > ~/.config/fish/completions/litgpt.fish"),
    "generate_full": ("generate_full out/full/final", "generate_full out/full/final --prompt 'Hello'"),
    "generate_adapter": ("generate_adapter out/adapter/final", "generate_adapter out/adapter/final --prompt 'Hello'"),
    "generate_adapter_v2": (
        "generate_adapter_v2 out/adapter_v2/final",
        "generate_adapter_v2 out/adapter_v2/final --prompt 'Hello'",
    ),
    "generate_sequentially": (
        "generate_sequentially Qwen/Qwen3-8B",
        "generate_sequentially Qwen/Qwen3-8B --devices 2 --prompt 'Hello'",
    ),
    "convert_to_litgpt": ("convert_to_litgpt Qwen/Qwen3-0.6B", "convert_to_litgpt Qwen/Qwen3-0.6B --dtype bfloat16"),
    "convert_from_litgpt": (
        "convert_from_litgpt checkpoints/ORG/NAME converted",
        "convert_from_litgpt checkpoints/ORG/NAME converted --model_pth false",
    ),
    "convert_pretrained_checkpoint": (
        "convert_pretrained_checkpoint out/pretrain/step-00001000 converted",
        "convert_pretrained_checkpoint out/pretrain/final converted",
    ),
}

PAGES = {  # beginning of a command: its page in tutorials/; the longest that fits holds
    "finetune_lora": "finetune_lora.md",
    "finetune_full": "finetune_full.md",
    "finetune_adapter": "finetune_adapter.md",
    **dict.fromkeys(
        ("finetune_dpo", "finetune_kto", "finetune_orpo", "finetune_simpo", "finetune_cpo"), "finetune_preference.md"
    ),
    "pretrain": "pretrain.md",
    "tokenizer": "pretrain.md",
    "recipes": "choosing_settings.md",
    "plan": "oom.md",
    "download": "download_model_weights.md",
    "chat": "inference.md",
    "generate": "inference.md",
    "serve": "deploy.md",
    "evaluate": "evaluation.md",
    "merge_lora": "use_elsewhere.md",
    "export": "use_elsewhere.md",
    "data": "your_data.md",
    "runs": "compare_runs.md",
    "ctl": "compare_runs.md",
    "validate": "use_elsewhere.md",
    "report": "compare_runs.md",
    "rerun": "compare_runs.md",
    "verify_resume": "resume.md",
    "doctor": "install.md",
    "completion": "completion.md",
    "convert": "convert_lit_models.md",
}
