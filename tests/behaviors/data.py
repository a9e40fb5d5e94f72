"""LitGPT's `litgpt.data` from Python, and its recipes for `lightning.Trainer`."""

import inspect
import json
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
import yaml
from lightning import LightningDataModule, LightningModule, Trainer, seed_everything

from litgpt import LLM, PromptStyle
from litgpt.data import (
    FLAN,
    JSON,
    LIMA,
    Alpaca,
    Alpaca2k,
    AlpacaGPT4,
    DataModule,
    Deita,
    LitData,
    LongForm,
    SFTDataset,
    TextFiles,
    TinyStories,
    get_sft_collate_fn,
)

TOKENIZER = Path(os.environ.get("BEHAVIOR_FOLDER", ""))  # a folder with a tokenizer
CONFIG = {
    "name": "tiny",
    "block_size": 256,
    "n_layer": 2,
    "n_embd": 16,
    "n_head": 2,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "bias": False,
    "intermediate_size": 32,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
}


class Letters:
    """A tokenizer with the contract of LitGPT's: a letter is a token."""

    bos_id, eos_id = 0, 1

    def encode(self, string, device=None, bos=None, eos=False, max_length=-1):
        ids = [self.bos_id] * bool(bos) + [ord(c) for c in string] + [self.eos_id] * eos
        return torch.tensor(ids[:max_length] if max_length > 0 else ids, dtype=torch.int)

    def decode(self, ids):
        return "".join(chr(i) for i in ids.tolist() if i > 1)


class Frame(PromptStyle):
    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return f"In: {prompt} Out:"


class Category(PromptStyle):
    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return f"{kwargs['category']}: {prompt} "


def rows(n=10):
    return [{"instruction": f"i{i}", "input": "", "output": f"o{i}", "category": f"c{i}"} for i in range(n)]


def folder():
    return Path(tempfile.mkdtemp())


def rows_file(name="rows.json", made=None):
    file = folder() / name
    made = rows() if made is None else made
    file.write_text("\n".join(map(json.dumps, made)) if name.endswith("jsonl") else json.dumps(made))
    return file


def connected(data, **options):
    data.connect(**{"tokenizer": Letters(), "batch_size": 3, **options})
    data.prepare_data()
    data.setup()
    return data


def names(dataset):
    return [row["instruction"] for row in dataset.data]


def raises(kinds, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except kinds:
        return
    raise AssertionError(f"{function} did not raise {kinds}")


def test_a_sample_of_sft_dataset():
    data = [{"instruction": "Foo", "output": "Bar"}, {"instruction": "Boo", "output": "Ahh"}]
    dataset = SFTDataset(data=data, tokenizer=Letters(), prompt_style=Frame())
    assert len(dataset) == 2
    sample = dataset[0]
    ids = [*map(ord, "In: Foo Out:"), *map(ord, "Bar"), 1]
    assert sample["input_ids"].tolist() == ids and sample["input_ids"].dtype == torch.int64
    assert sample["labels"].tolist() == [-100] * 12 + ids[12:]
    assert sample["token_counts"] == {"raw": 7, "raw_plus_prompt_template": 16}


def test_prompts_are_trained_on_if_they_are_not_masked():
    sample = SFTDataset(rows(), Letters(), Frame(), mask_prompt=False)[3]
    assert torch.equal(sample["labels"], sample["input_ids"])


def test_ignore_index():
    sample = SFTDataset(rows(), Letters(), "alpaca", ignore_index=-1)[0]
    assert (sample["labels"] == -1).sum() == len(sample["labels"]) - 3


def test_max_seq_length():
    dataset = SFTDataset(rows(), Letters(), Frame(), max_seq_length=13)
    sample = dataset[0]
    assert Letters().decode(sample["input_ids"]) == "In: i0 Out:o0" and len(sample["labels"]) == 13
    short = SFTDataset(rows(), Letters(), Frame(), max_seq_length=5)[0]
    assert short["labels"].tolist() == [-100] * 5 and short["token_counts"]["raw_plus_prompt_template"] == 5


def test_transform():
    dataset = SFTDataset(
        [{"q": "a", "a": "b"}], Letters(), Frame(), transform=lambda r: dict(instruction=r["q"], output=r["a"])
    )
    assert Letters().decode(dataset[0]["input_ids"]) == "In: a Out:b"


def test_the_style_receives_the_columns_of_the_row():
    sample = SFTDataset(rows(), Letters(), Category())[2]
    assert Letters().decode(sample["input_ids"]) == "c2: i2 o2"


def test_a_style_by_name():
    dataset = SFTDataset([{"instruction": "Add.", "input": "1", "output": "2"}], Letters(), "alpaca")
    text = Letters().decode(dataset[0]["input_ids"])
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n1\n\n### Response:\n2")


def test_padding():
    counts = {"raw": 2, "raw_plus_prompt_template": 3}
    samples = [
        {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([10, 20, 30]), "token_counts": counts},
        {"input_ids": torch.tensor([4, 5]), "labels": torch.tensor([40, 50]), "token_counts": counts},
    ]
    batch = get_sft_collate_fn()(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["labels"].tolist() == [[10, 20, 30], [40, 50, -100]]
    assert batch["token_counts"]["raw"].tolist() == [[2], [2]]
    assert batch["token_counts"]["raw_plus_prompt_template"].tolist() == [[3], [3]]
    batch = get_sft_collate_fn(max_seq_length=2, pad_id=99, ignore_index=-1)(samples)
    assert batch["input_ids"].tolist() == [[1, 2], [4, 5]] and batch["labels"].tolist() == [[10, 20], [40, 50]]
    batch = get_sft_collate_fn(pad_id=99, ignore_index=-1)(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 99]] and batch["labels"].tolist()[1] == [40, 50, -1]


def test_json():
    data = JSON(rows_file(), val_split_fraction=0.25, prompt_style=Frame(), num_workers=0)
    assert isinstance(data, LightningDataModule) and isinstance(data, DataModule)
    connected(data)
    train, val = data.train_dataloader(), data.val_dataloader()
    assert len(train) == 3 and len(val) == 1 and isinstance(train.dataset.prompt_style, Frame)
    assert len(train.dataset) == 8 and len(val.dataset) == 2
    batch = next(iter(val))
    assert set(batch) == {"input_ids", "labels", "token_counts"}


def test_json_lines():
    data = connected(JSON(rows_file("rows.jsonl"), val_split_fraction=0.5, num_workers=0))
    assert len(data.train_dataloader().dataset) == len(data.val_dataloader().dataset) == 5


def test_the_split_and_the_order():
    """The same seed makes the same batches as in LitGPT."""
    data = connected(JSON(rows_file(), val_split_fraction=0.25, prompt_style=Frame(), num_workers=0))
    assert names(data.train_dataloader().dataset) == "i2 i6 i1 i8 i4 i5 i0 i9".split()
    assert names(data.val_dataloader().dataset) == ["i3", "i7"]
    texts = [[Letters().decode(ids) for ids in batch["input_ids"]] for batch in data.train_dataloader()]
    seen = [[text[4:6] for text in batch] for batch in texts]
    assert seen == [["i4", "i0", "i1"], ["i8", "i2", "i9"], ["i6", "i5"]]


def test_a_seed():
    made = [connected(JSON(rows_file(), val_split_fraction=0.3, seed=seed, num_workers=0)) for seed in (1, 1, 2)]
    first, same, other = (names(data.val_dataloader().dataset) for data in made)
    assert first == same != other


def test_the_style_of_json():
    assert type(JSON(rows_file()).prompt_style).__name__ == "Alpaca"
    assert type(JSON(rows_file(), prompt_style="llama3").prompt_style).__name__ == "Llama3"
    data = connected(JSON(rows_file(), prompt_style=Category(), num_workers=0))
    assert Letters().decode(data.train_dataloader().dataset[0]["input_ids"]).startswith("c")


def test_mask_prompt_of_json():
    for mask in (False, True):
        data = connected(JSON(rows_file(), mask_prompt=mask, val_split_fraction=0.5, num_workers=0))
        batch = next(iter(data.train_dataloader()))
        assert bool((batch["labels"][0] == -100).any()) == mask
        assert (batch["labels"] != -100).sum() == (3 * 3 if mask else batch["input_ids"].ne(0).sum())


def test_max_seq_length_of_json():
    data = connected(JSON(rows_file(), val_split_fraction=0.5, num_workers=0), max_seq_length=20)
    assert all(batch["input_ids"].shape[1] == 20 for batch in data.train_dataloader())


def test_a_folder_with_train_and_val():
    place = folder()
    (place / "train.json").write_text(json.dumps(rows(4)))
    (place / "val.json").write_text(json.dumps(rows(2)))
    data = connected(JSON(place, num_workers=0))
    assert names(data.train_dataloader().dataset) == ["i0", "i1", "i2", "i3"]
    assert names(data.val_dataloader().dataset) == ["i0", "i1"]


def test_json_paths_that_cannot_be_used():
    raises(FileNotFoundError, JSON, Path("not/a/path"))
    place = folder()
    raises(ValueError, JSON, place, val_split_fraction=0.5)
    raises(FileNotFoundError, JSON(place).setup)


def test_alpaca():
    place = folder()
    (place / "alpaca_data_cleaned_archive.json").write_text(json.dumps(rows()))
    data = Alpaca(val_split_fraction=0.4, download_dir=place, num_workers=0)
    assert isinstance(data, LightningDataModule) and type(data.prompt_style).__name__ == "Alpaca"
    connected(data, batch_size=4, max_seq_length=300)
    assert names(data.train_dataloader().dataset) == "i2 i6 i1 i8 i4 i5".split()
    assert names(data.val_dataloader().dataset) == "i0 i9 i3 i7".split()
    assert [batch["input_ids"].shape[0] for batch in data.train_dataloader()] == [4, 2]


def test_alpaca_gpt4():
    place = folder()
    (place / "alpacagpt4_data_cleaned_archive.json").write_text(json.dumps(rows()))
    data = connected(AlpacaGPT4(val_split_fraction=0.5, download_dir=place, num_workers=0))
    assert len(data.train_dataloader().dataset) == 5


def test_another_file_of_alpaca():
    place = folder()
    (place / "mine.json").write_text(json.dumps(rows()))
    data = Alpaca(False, 0.5, "alpaca", -100, 42, 0, place, "http://localhost/mine.json", "mine.json")
    assert len(connected(data).train_dataloader().dataset) == 5


def test_longform():
    place = folder()
    for name, n in (("train", 4), ("val", 2)):
        made = [{"input": f"i{i}", "output": f"o{i}", "source": "x"} for i in range(n)]
        (place / f"{name}.json").write_text(json.dumps(made))
    data = LongForm(download_dir=place, num_workers=0)
    assert type(data.prompt_style).__name__ == "Longform"
    connected(data)
    assert len(data.train_dataloader().dataset) == 4 and len(data.val_dataloader().dataset) == 2
    text = Letters().decode(data.train_dataloader().dataset[0]["input_ids"])
    assert "### Instruction:\ni0\n\n### Response:\no0" in text


def test_flan():
    place = folder()
    for split in ("train", "test"):
        made = [{"inputs": f"i{i}", "targets": f"o{i}"} for i in range(4)]
        (place / f"aeslc_10templates_{split}.jsonl").write_text("\n".join(map(json.dumps, made)))
    data = connected(FLAN(subsets="aeslc_10templates", download_dir=place, num_workers=0))
    assert type(data.prompt_style).__name__ == "FLAN"
    assert len(data.train_dataloader().dataset) == len(data.val_dataloader().dataset) == 4
    assert "### Instruction:\ni" in Letters().decode(next(iter(data.train_dataloader()))["input_ids"][0])
    raises(ValueError, FLAN, subsets="no_such_templates")


def test_arguments_and_their_order():
    head = ["mask_prompt", "val_split_fraction", "prompt_style", "ignore_index", "seed", "num_workers"]
    without_split = [name for name in head if name != "val_split_fraction"]
    expected = {
        JSON: ["json_path", *head],
        Alpaca: [*head, "download_dir", "file_url", "file_name"],
        Alpaca2k: [*head, "download_dir", "file_url", "file_name", "repo_id"],
        LIMA: [*head, "include_multiturn_conversations", "repo_id", "access_token"],
        Deita: [*without_split, "include_multiturn_conversations", "download_dir", "repo_id"],
        FLAN: [*without_split, "download_dir", "url", "subsets"],
        LongForm: [*without_split, "download_dir"],
        TextFiles: ["train_data_path", "val_data_path", "seed", "num_workers"],
        TinyStories: ["data_path", "seed", "num_workers"],
    }
    for kind, arguments in expected.items():
        assert list(inspect.signature(kind).parameters)[: len(arguments)] == arguments, kind


def test_defaults():
    data = Alpaca()
    assert (data.mask_prompt, data.val_split_fraction, data.seed, data.num_workers) == (False, 0.03865, 42, 4)
    assert Alpaca2k().val_split_fraction == 0.05 and AlpacaGPT4().val_split_fraction == 0.03847
    assert LIMA(access_token="x").val_split_fraction == 0.1 and JSON(rows_file()).val_split_fraction == 0.05
    assert Alpaca().ignore_index == -100 and Alpaca().download_dir == Path("data/alpaca")


def test_a_data_module_of_ones_own():
    class Mine(DataModule):
        def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
            self.tokenizer, self.batch_size = tokenizer, batch_size

        def setup(self, stage=""):
            self.dataset = SFTDataset(rows(4), self.tokenizer, Frame())

        def train_dataloader(self):
            return torch.utils.data.DataLoader(self.dataset, self.batch_size, collate_fn=get_sft_collate_fn())

    data = Mine()
    assert isinstance(data, LightningDataModule)
    data.connect(Letters(), batch_size=2)
    data.prepare_data()
    data.setup()
    assert [batch["input_ids"].shape for batch in data.train_dataloader()] == [(2, 14), (2, 14)]


def test_a_subclass_of_alpaca():
    class Mine(Alpaca):
        def prepare_data(self):
            self.prepared = True

    place = folder()
    (place / "alpaca_data_cleaned_archive.json").write_text(json.dumps(rows()))
    data = connected(Mine(download_dir=place, val_split_fraction=0.5, num_workers=0))
    assert data.prepared and len(data.train_dataloader().dataset) == 5


def test_workers():
    data = connected(JSON(rows_file(), val_split_fraction=0.5, num_workers=1))
    assert data.train_dataloader().num_workers == 1
    assert sum(len(batch["input_ids"]) for batch in data.train_dataloader()) == 5


def test_text_files():
    place = folder()
    for i in range(3):
        (place / f"{i}.txt").write_text(f"doc{i} " * 30)
    data = TextFiles(place, num_workers=0)
    data.connect(Letters(), batch_size=2, max_seq_length=16)
    data.prepare_data()
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batches = list(loader)
        assert len(batches) >= 4 and all(batch.shape == (2, 17) for batch in batches)
        text = Letters().decode(batches[0][0])
        assert len(text) >= 16 and set(text) <= set("doc012 ")


def test_modules_of_the_data_sets():
    import litgpt.data.base
    import litgpt.data.text_files

    assert litgpt.data.base.DataModule is DataModule and litgpt.data.base.SFTDataset is SFTDataset
    assert litgpt.data.base.get_sft_collate_fn is get_sft_collate_fn
    assert litgpt.data.text_files.TextFiles is TextFiles


def block(i):
    """A text of forty tokens, for litdata."""
    yield torch.full((40,), i, dtype=torch.int)


def test_lit_data():
    try:
        from litdata import optimize
        from litdata.streaming import TokensLoader
    except ImportError:
        raises((ImportError, ValueError), LitData)
        return
    place = folder()
    for part in ("train", "val"):
        options = {"num_workers": 1, "chunk_bytes": "1MB", "item_loader": TokensLoader()}
        optimize(fn=block, inputs=list(range(1, 9)), output_dir=str(place / part), **options)
    data = LitData(data_path=place, split_names=("train", "val"), num_workers=0)
    assert isinstance(data, DataModule)
    connected(data, batch_size=2, max_seq_length=9)
    train, val = list(data.train_dataloader()), list(data.val_dataloader())
    assert len(train) == len(val) == 16 and train[0].shape == (2, 10)
    assert train[0][:, 0].tolist() == [5, 4] and val[0][:, 0].tolist() == [1, 1]
    raises(ValueError, LitData, data_path=place, split_names=("train",))


@cache
def checkpoint():
    """A tiny model in LitGPT's format, from its folder of a tokenizer."""
    place = folder() / "tiny"
    place.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / file, place / file)
    config = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": True}))
    made = json.loads((place / "tokenizer.json").read_text())
    n_tokens = 1 + max(*made["model"]["vocab"].values(), *(token["id"] for token in made["added_tokens"]))
    fields = {**CONFIG, "vocab_size": n_tokens, "padded_vocab_size": n_tokens}
    (place / "model_config.yaml").write_text(yaml.safe_dump(fields))
    torch.manual_seed(7)
    width, inner = fields["n_embd"], fields["intermediate_size"]
    shapes = {"lm_head.weight": (n_tokens, width), "transformer.wte.weight": (n_tokens, width)}
    for i in range(fields["n_layer"]):
        shapes |= {
            f"transformer.h.{i}.norm_1.weight": (width,),
            f"transformer.h.{i}.attn.qkv.weight": (3 * width, width),
            f"transformer.h.{i}.attn.proj.weight": (width, width),
            f"transformer.h.{i}.norm_2.weight": (width,),
            f"transformer.h.{i}.mlp.fc_1.weight": (inner, width),
            f"transformer.h.{i}.mlp.fc_2.weight": (inner, width),
            f"transformer.h.{i}.mlp.proj.weight": (width, inner),
        }
    shapes["transformer.ln_f.weight"] = (width,)
    state = {k: torch.ones(s) if len(s) == 1 else torch.randn(s) * 0.3 for k, s in shapes.items()}
    torch.save({"model": state}, place / "lit_model.pth")
    return place


def sums(n=40):
    return [{"instruction": f"Add {i} and {i + 1}.", "input": "", "output": f"{2 * i + 1}"} for i in range(n)]


class Recipe(LightningModule):
    """A model in a loop of Lightning's. `losses` are those of its steps."""

    def __init__(self, llm, whole=True):
        super().__init__()
        self.llm, self.whole, self.losses = llm, whole, []

    def training_step(self, batch, index):
        if self.whole:
            _, loss = self.llm(input_ids=batch["input_ids"], target_ids=batch["labels"])
        else:
            logits = self.llm(batch["input_ids"])
            targets = batch["labels"][:, 1:].reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(targets), -1), targets)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        logits = self.llm(batch["input_ids"])
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.log("val_loss", loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.llm.parameters(), lr=0.01, weight_decay=0.0)


def fit(recipe, data, steps=6):
    seed_everything(0, verbose=False)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=steps, enable_model_summary=False, **options)
    trainer.fit(recipe, data)
    return trainer


def close(found, expected):
    assert len(found) == len(expected), found
    assert all(abs(a - b) < 1e-3 for a, b in zip(found, expected)), found


def trainable():
    """The tiny model, ready for training, with the weights of its file."""
    llm = LLM.load(str(checkpoint()), distribute=None)
    llm.trainer_setup()
    state = torch.load(checkpoint() / "lit_model.pth")["model"]
    if state.keys() == llm.model.state_dict().keys():  # LitGPT initializes the weights here
        llm.model.load_state_dict(state)
    return llm


def sums_data(llm, **options):
    data = JSON(rows_file(made=sums()), val_split_fraction=0.25, num_workers=0, **options)
    data.connect(llm.tokenizer, batch_size=4, max_seq_length=200)
    return data


def test_rows_with_a_tokenizer_of_a_folder():
    llm = LLM.load(str(checkpoint()), distribute=None)
    data = sums_data(llm, mask_prompt=True)
    data.prepare_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    answer = labels[labels != -100]
    assert answer[-1] == llm.tokenizer.eos_id and torch.equal(ids[labels != -100], answer)
    assert (
        ids[0] == llm.tokenizer.bos_id
        and llm.tokenizer.bos_id
        not in ids[1:].tolist()[: int(batch["token_counts"]["raw_plus_prompt_template"][0]) - 1]
    )


def test_trainer_with_llm():
    llm = trainable()
    recipe = Recipe(llm)
    trainer = fit(recipe, sums_data(llm))
    close(recipe.losses, LLM_LOSSES)
    assert trainer.global_step == 6


def test_trainer_with_gpt():
    llm = trainable()
    recipe = Recipe(llm.model, whole=False)
    fit(recipe, sums_data(llm, mask_prompt=True))
    close(recipe.losses, GPT_LOSSES)


def test_trainer_with_loaders_and_a_custom_style():
    llm = trainable()
    recipe = Recipe(llm)
    data = sums_data(llm, prompt_style=Frame())
    data.prepare_data()
    data.setup()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, enable_model_summary=False, **options)
    trainer.fit(recipe, data.train_dataloader(), data.val_dataloader())
    close([float(trainer.callback_metrics["val_loss"])], [VAL_LOSS])
    assert len(recipe.losses) == 8 and recipe.losses[-1] < recipe.losses[0]
    close(recipe.losses, STYLE_LOSSES)


def test_generation_with_a_style_of_ones_own():
    llm = LLM.load(str(checkpoint()))
    llm.prompt_style = PromptStyle.from_name("alpaca")
    other = llm.generate("fox", max_new_tokens=8, top_k=1)
    llm.prompt_style = Frame()
    framed = llm.generate("fox", max_new_tokens=8, top_k=1)

    class Plain(PromptStyle):
        def apply(self, prompt, *, sys_prompt=None, **kwargs):
            return prompt

    llm.prompt_style = Plain()
    assert llm.generate("In: fox Out:", max_new_tokens=8, top_k=1) == framed != other


def test_generation_ends_at_the_stop_tokens_of_a_style():
    class Plain(PromptStyle):
        stops = ()

        def apply(self, prompt, *, sys_prompt=None, **kwargs):
            return prompt

        def stop_tokens(self, tokenizer):
            return ([tokenizer.eos_id], *([i] for i in self.stops))

    llm = LLM.load(str(checkpoint()))
    llm.prompt_style = style = Plain()
    ids = llm.generate("fox", max_new_tokens=8, top_k=1, return_as_token_ids=True).tolist()
    style.stops = (ids[-3],)
    first = ids.index(ids[-3], len(ids) - 8)
    shorter = llm.generate("fox", max_new_tokens=8, top_k=1, return_as_token_ids=True).tolist()
    assert shorter == ids[: len(shorter)] and len(shorter) in (first, first + 1) and len(shorter) < len(ids)


def test_the_style_of_a_folder():
    place = folder() / "tiny"
    shutil.copytree(checkpoint(), place)
    (place / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Llama3\n")
    assert type(LLM.load(str(place), distribute=None).prompt_style).__name__ == "Llama3"


LLM_LOSSES = [7.473186, 6.478420, 5.953553, 5.570879, 5.197662, 4.934974]
GPT_LOSSES = [7.951557, 7.449888, 6.698954, 6.023408, 5.314863, 5.613097]
STYLE_LOSSES = [7.106420, 6.433194, 5.972566, 5.344699, 5.177120, 4.861935, 4.692575, 4.335541]
VAL_LOSS = 3.990634

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import runner

    runner.main(globals())
