"""`LLM` in a training loop of one's own, as LitGPT's Python tutorials use it."""

import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from litgpt import LLM, Config

sys.path.insert(0, str(Path(__file__).parent))
from tiny import checkpoint, weights

IDS = torch.tensor([[5, 9, 200, 31, 7, 320, 9, 12]])


@cache
def folder() -> Path:
    return checkpoint(Path(tempfile.mkdtemp()) / "checkpoints" / "me" / "tiny")


def loaded() -> LLM:
    return LLM.load(str(folder()))


def trainable() -> LLM:
    llm = LLM.load(str(folder()), distribute=None)
    llm.trainer_setup()
    return llm


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), atol=1e-2)


def test_preprocessor_encodes_to_a_tensor_and_decodes():
    llm = loaded()
    ids = llm.preprocessor.encode("Hello there")
    assert isinstance(ids, torch.Tensor) and ids.dim() == 1 and len(ids) > 1
    assert llm.preprocessor.decode(ids).strip() == "Hello there"


def test_preprocessor_has_the_tokenizer_and_a_device():
    llm = loaded()
    assert llm.preprocessor.tokenizer is llm.tokenizer
    assert torch.device(llm.preprocessor.device).type in ("cpu", "cuda")
    assert llm.tokenizer.eos_id is not None


def test_fabric_after_load():
    assert loaded().fabric is not None and loaded().fabric.world_size == 1


def test_no_fabric_before_distribute():
    assert LLM.load(str(folder()), distribute=None).fabric is None


def test_state_dict_has_litgpts_names():
    assert set(loaded().state_dict()) == set(weights())


def test_state_dict_has_the_weights_of_the_file():
    state = loaded().state_dict()
    assert all(close(state[name].cpu(), tensor) for name, tensor in weights().items())


def test_load_state_dict_takes_litgpts_names():
    llm = trainable()
    llm.load_state_dict({name: tensor + 1 for name, tensor in weights().items()})
    assert close(llm.state_dict()["transformer.h.1.mlp.fc_2.weight"], weights()["transformer.h.1.mlp.fc_2.weight"] + 1)


def test_load_state_dict_misses_a_weight():
    state = weights()
    del state["transformer.h.0.mlp.fc_1.weight"]
    try:
        trainable().load_state_dict(state)
    except RuntimeError as e:
        assert "mlp.fc" in str(e)
    else:
        raise AssertionError("nothing was raised")


def test_state_dict_within_a_module():
    outer = torch.nn.Module()
    outer.llm = trainable()
    assert {f"llm.{name}" for name in weights()} == set(outer.state_dict())


def test_forward_gives_logits():
    llm = loaded()
    with torch.no_grad():
        logits = llm(IDS.to(llm.preprocessor.device))
    assert logits.shape == (1, 8, 640)


def test_forward_with_targets_gives_the_loss():
    llm = trainable()
    logits, loss = llm(input_ids=IDS, target_ids=IDS)
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:])
    assert logits.shape == (1, 8, 640) and abs(loss.item() - expected.item()) < 1e-5


def test_ignored_targets():
    llm, targets = trainable(), IDS.clone()
    targets[:, :4] = -100
    logits, loss = llm(IDS, targets)
    expected = torch.nn.functional.cross_entropy(logits[0, 3:-1], IDS[0, 4:])
    assert abs(loss.item() - expected.item()) < 1e-5
    assert llm(IDS, torch.full_like(IDS, -100))[1].item() == 0


def test_a_loss_of_ones_own():
    def loss_fn(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert logits.shape == (1, 7, 640) and torch.equal(targets, IDS[:, 1:])
        return logits.sum() * 0 + 42

    assert trainable()(IDS, IDS, loss_fn=loss_fn)[1].item() == 42


def test_an_optimizer_over_the_parameters_of_the_model():
    llm = trainable()
    optimizer, losses = torch.optim.AdamW(llm.model.parameters(), lr=1e-2), []
    for _ in range(5):
        _, loss = llm(IDS, IDS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    assert not close(llm.state_dict()["transformer.wte.weight"], weights()["transformer.wte.weight"])


def test_weights_have_gradients_without_trainer_setup():
    llm = loaded()
    ids = IDS.to(llm.preprocessor.device)
    _, loss = llm(ids, ids)
    loss.backward()
    assert all(p.grad is not None for p in llm.model.parameters())


def test_trainer_setup_reads_a_checkpoint_of_lightnings_trainer():
    path = Path(tempfile.mkdtemp()) / "last.ckpt"
    torch.save({"state_dict": {f"llm.{name}": tensor * 2 for name, tensor in weights().items()}}, path)
    llm = LLM.load(str(folder()), distribute=None)
    llm.trainer_setup(trainer_ckpt=path)
    assert close(llm.state_dict()["lm_head.weight"], weights()["lm_head.weight"] * 2)


def test_a_lightning_module():
    import lightning as L

    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.llm = LLM.load(str(folder()), distribute=None)

        def setup(self, stage: str) -> None:
            self.llm.trainer_setup()

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            _, loss = self.llm(input_ids=batch["input_ids"], target_ids=batch["labels"])
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.llm.model.parameters(), lr=1e-2)

    model, batch = Lit(), {"input_ids": IDS, "labels": IDS}
    trainer = L.Trainer(max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([batch] * 3, batch_size=None))
    assert trainer.global_step == 3
    assert not close(model.llm.state_dict()["transformer.wte.weight"].cpu(), weights()["transformer.wte.weight"])
    file = Path(tempfile.mkdtemp()) / "last.ckpt"
    trainer.save_checkpoint(file)
    again = LLM.load(str(folder()), distribute=None)
    again.trainer_setup(trainer_ckpt=file)
    assert close(again.state_dict()["lm_head.weight"], model.llm.state_dict()["lm_head.weight"].cpu())
    model.llm.model.to(model.llm.preprocessor.device)
    assert isinstance(model.llm.generate("Hello", max_new_tokens=3), str)


def test_generate_text_ids_and_streams():
    llm = loaded()
    text = llm.generate("Hello", max_new_tokens=6, top_k=1)
    ids = llm.generate("Hello", max_new_tokens=6, top_k=1, return_as_token_ids=True)
    assert isinstance(text, str) and isinstance(ids, torch.Tensor) and ids.dim() == 1 and 0 < len(ids) <= 6
    assert len("".join(llm.generate("Hello", max_new_tokens=6, top_k=1, stream=True))) > 0
    assert llm.generate("Hello", max_new_tokens=6, top_k=1) == text


def test_generate_after_training():
    llm = trainable()
    _, loss = llm(IDS, IDS)
    assert isinstance(llm.generate("Hello", max_new_tokens=3), str)
    llm.train()
    _, loss = llm(IDS, IDS)
    loss.backward()


def test_save_and_load():
    llm, out = loaded(), Path(tempfile.mkdtemp()) / "out"
    llm.save(out)
    again = LLM.load(str(out))
    assert all(close(a, llm.state_dict()[name]) for name, a in again.state_dict().items())
    first, second = (one.generate("Hello", max_new_tokens=4, top_k=1) for one in (llm, again))
    assert first == second


def test_distribute_later():
    llm = LLM.load(str(folder()), distribute=None)
    llm.distribute(accelerator="cpu", devices=1)
    assert llm.fabric is not None and isinstance(llm.generate("Hello", max_new_tokens=3), str)


def test_config_prompt_style_and_folder():
    llm = loaded()
    assert (llm.config.n_layer, llm.config.n_embd, llm.config.padded_vocab_size) == (2, 32, 640)
    assert "Hello" in llm.prompt_style.apply("Hello")
    assert Path(llm.checkpoint_dir) == folder()


def test_the_config_of_the_model():
    llm = loaded()
    assert llm.model.config is llm.config and isinstance(llm.config, Config)
    assert (llm.config.vocab_size, llm.config.block_size, llm.config.head_size) == (640, 64, 8)
    assert llm.config.hf_config == {"org": "me", "name": "tiny"} and llm.config.mlp_class.__name__ == "LLaMAMLP"


def test_the_state_dict_of_the_model():
    llm = loaded()
    state = llm.model.state_dict()
    assert set(state) == set(weights()) and all(close(state[n].cpu(), t) for n, t in weights().items())
    assert not llm.model.load_state_dict({n: t * 2 for n, t in weights().items()}).missing_keys
    assert close(
        llm.state_dict()["transformer.h.0.mlp.fc_1.weight"].cpu(), weights()["transformer.h.0.mlp.fc_1.weight"] * 2
    )


def test_the_cache_of_the_model():
    llm = loaded()
    ids = IDS.to(llm.preprocessor.device)
    with torch.no_grad():
        expected = llm.model(ids)
        llm.model.set_kv_cache(batch_size=1, max_seq_length=16)
        first = llm.model(ids[:, :5], torch.arange(5, device=ids.device))
        parts = [first, *(llm.model(ids[:, i : i + 1], torch.tensor([i], device=ids.device)) for i in (5, 6, 7))]
    assert torch.allclose(torch.cat(parts, dim=1).float(), expected.float(), atol=0.1)  # in bfloat16
    for block in llm.model.transformer.h:
        block.attn.kv_cache.reset_parameters()
    with torch.no_grad():
        again = llm.model(ids[:, :5], torch.arange(5, device=ids.device))
    assert torch.allclose(again.float(), first.float(), atol=0.1)
    llm.model.clear_kv_cache()
    assert isinstance(llm.generate("Hello", max_new_tokens=3), str)


def test_the_length_of_the_model():
    llm = loaded()
    assert llm.model.max_seq_length == 64
    llm.model.max_seq_length = 6
    try:
        llm.model(IDS.to(llm.preprocessor.device))
    except ValueError as e:
        assert "max" in str(e)
    else:
        raise AssertionError("nothing was raised")
    llm.model.max_seq_length = 64
    assert llm.model(IDS.to(llm.preprocessor.device)).shape == (1, 8, 640)


def test_the_parameters_of_the_model_after_generating():
    llm = loaded()
    llm.generate("Hello", max_new_tokens=3)
    heads = [p for name, p in llm.model.named_parameters() if name.endswith("lm_head.weight")]
    assert close(heads[0].detach().cpu(), weights()["lm_head.weight"])
    assert all(p.requires_grad for p in llm.model.parameters())


def test_random_weights_by_the_name_of_a_model():
    llm = LLM.load("pythia-14m", init="random", tokenizer_dir=folder())
    assert (llm.config.name, llm.config.n_layer, llm.config.n_embd) == ("pythia-14m", 6, 128)
    assert llm.state_dict()["transformer.h.5.mlp.fc.weight"].shape == (512, 128)
    assert llm.prompt_style.apply("Hello") == "Hello"
    assert llm.checkpoint_dir is None and isinstance(llm.generate("Hello", max_new_tokens=2), str)


def test_another_tokenizer():
    bare = checkpoint(Path(tempfile.mkdtemp()) / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    llm = LLM.load(str(bare), tokenizer_dir=folder())
    assert llm.tokenizer.decode(llm.tokenizer.encode("Hello")) == loaded().tokenizer.decode(
        llm.tokenizer.encode("Hello")
    )
    assert isinstance(llm.generate("Hello", max_new_tokens=3), str)


def test_random_weights_need_a_tokenizer():
    try:
        LLM.load("pythia-14m", init="random")
    except ValueError as e:
        assert "tokenizer" in str(e)
    else:
        raise AssertionError("nothing was raised")


def test_another_init_is_refused():
    try:
        LLM.load(str(folder()), init="zeros")
    except ValueError as e:
        assert "init" in str(e)
    else:
        raise AssertionError("nothing was raised")


def test_benchmark():
    llm = loaded()
    text, metrics = llm.benchmark(num_iterations=2, prompt="Hello", max_new_tokens=4, top_k=1)
    assert isinstance(text, str) and {"Seconds total", "Tokens generated"} <= set(metrics)
    assert all(len(values) == 2 for values in metrics.values())


if __name__ == "__main__":
    from runner import main

    main(globals())
