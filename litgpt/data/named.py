"""The published data sets, each a row of a table: the files, the names of the columns, and the defaults of options."""

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Optional
from urllib.parse import urlsplit

from litgpt.data.data_module import DataModule, TokenizedDataset
from litgpt.data.download import fetch, hub_url, placed, unpack
from litgpt.data.row_files import Rows
from litgpt.data.sources import RowSource
from litgpt.errors import UserError, nearest, remark
from litgpt.text.prompts import choose_style
from litgpt.text.tokenizer import Tokenizer

SUBSETS = [
    f"{name}_10templates"
    for name in """
    aeslc ag_news_subset anli_r1 anli_r2 anli_r3 arc_challenge arc_easy bool_q cb cnn_dailymail cola common_gen copa
    coqa cosmos_qa dart definite_pronoun_resolution drop e2e_nlg fix_punct gigaword glue_mrpc glue_qqp hellaswag
    imdb_reviews math_dataset mnli_matched mnli_mismatched multi_news multirc natural_questions openbookqa
    opinion_abstracts_idebate opinion_abstracts_rotten_tomatoes para_crawl_enes paws_wiki piqa qnli quac record rte
    samsum sentiment140 snli squad_v1 squad_v2 sst2 story_cloze stsb trec trivia_qa true_case web_nlg_en wic
    wiki_lingua_english_en wmt14_enfr wmt16_translate_csen wmt16_translate_deen wmt16_translate_fien
    wmt16_translate_roen wmt16_translate_ruen wmt16_translate_tren wnli word_segment wsc yelp_polarity_reviews
    """.split()
]

LITGPT_FLAN = "https://huggingface.co/datasets/Muennighoff/flan/resolve/main"


class PublishedDataSet(DataModule):
    """A data set that is downloaded on first use. A subclass with class keywords is a row of the table.

    The keywords are `train`, `val`, and `columns`, as below, and the defaults of inherited options.

    Args:
        download_dir: Folder for the files. Files that are already there are not downloaded again.

    Attributes:
        train: Maps the name of each training file to its address: a URL, `hub:ORG/NAME/FILE` for a file of a data set
            on the Hugging Face hub, or `hf:ORG/NAME:SPLIT` for rows that the `datasets` package reads unless
            `download_dir` has a .parquet, .json, or .jsonl file of that name.
        val: The same for validation. If empty, some of the training rows are held out.
        columns: Maps columns of the files to litgpt's columns.
        hint: Added to the error if a download fails.
    """

    train: Mapping[str, str]
    val: Mapping[str, str]
    columns: Mapping[str, str]
    hint = ""

    def __init_subclass__(
        cls,
        train: Optional[Mapping[str, str]] = None,
        val: Optional[Mapping[str, str]] = None,
        columns: Optional[Mapping[str, str]] = None,
        **defaults: Any,
    ) -> None:
        super().__init_subclass__()
        if train is not None:
            cls.train, cls.val, cls.columns = train, val or {}, columns or {}
            folder = Path("data", cls.__name__.lower())
            set_defaults(cls, {"mask_prompt": False, "prompt_style": "alpaca", "download_dir": folder, **defaults})

    def __init__(self, download_dir: Path = Path("data"), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.download_dir = Path(download_dir)

    def token(self) -> Optional[str]:
        """The access token for downloads."""
        return None

    def source(self, name: str, address: str) -> RowSource:
        if address.startswith("hf:"):
            return RowSource(placed(self.download_dir, name) or address)
        if address.startswith("hub:"):
            organization, data_set, file = address.removeprefix("hub:").split("/", 2)
            address = hub_url(f"{organization}/{data_set}", file)
        return RowSource(fetch(address, self.download_dir / name, self.token(), self.hint))

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        train, val = ([self.source(*file) for file in files.items()] for files in (self.train, self.val))
        return train, val or None

    def adapt(self, fields: dict[str, Any]) -> Optional[dict[str, Any]]:
        return {self.columns.get(name, name): value for name, value in fields.items()}


def set_defaults(cls: type, defaults: Mapping[str, Any]) -> None:
    """Change the defaults of the options of a class. Its signature then has all options, its own before inherited."""
    init = cls.__init__  # type: ignore[misc]
    inherited = inspect.signature(DataModule.__init__).parameters
    options: dict[str, inspect.Parameter] = {}
    docs = ["Args:"]
    for base in reversed(cls.__mro__[:-1]):
        options |= inspect.signature(vars(base).get("__init__", DataModule.__init__)).parameters
        docs.append(inspect.cleandoc(base.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0])
    this, _ = options.pop("self"), options.pop("kwargs")

    def rank(name: str) -> int:
        return 2 if name == "download_dir" else 0 if name in defaults else 3 if name in inherited else 1

    parameters = [options[n].replace(default=defaults.get(n, options[n].default)) for n in sorted(options, key=rank)]
    signature = inspect.Signature([this, *parameters])

    @wraps(init)
    def __init__(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        init(**bound.arguments)

    __init__.__doc__ = "\n".join(docs)
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[misc]


class OneFile(PublishedDataSet):
    """A data set in one file.

    Args:
        file_url: Address of the file. Default: the published one.
        file_name: Name of the file in download_dir. Default: the last part of its address.
    """

    def __init__(self, file_url: Optional[str] = None, file_name: Optional[str] = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        ((name, address),) = self.train.items()
        if file_url and not re.match(r"https?://", file_url):
            raise UserError(f"--data.file_url {file_url}: expected an address that begins with https://.")
        if file_url and file_url != address:
            name, address = Path(urlsplit(file_url).path).name or name, file_url
        if file_name and Path(file_name).name != file_name:
            raise UserError(f"--data.file_name {file_name}: expected a name without a folder. See --data.download_dir.")
        self.train = {file_name or name: address}


class HubDataSet(PublishedDataSet):
    """A data set on the Hugging Face hub.

    Args:
        repo_id: Repository ORG/NAME with the same files. Default: the published one.
    """

    def __init__(self, repo_id: Optional[str] = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if repo_id is None:
            return
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
            raise UserError(f"--data.repo_id {repo_id}: expected ORG/NAME.")
        self.train, self.val = (
            {name: re.sub(r"(?<=:)[\w.-]+/[\w.-]+", repo_id, address, count=1) for name, address in files.items()}
            for files in (self.train, self.val)
        )


class Alpaca(
    OneFile,
    train={
        "alpaca_data_cleaned_archive.json": "https://raw.githubusercontent.com/tloen/alpaca-lora/main/"
        "alpaca_data_cleaned_archive.json"
    },
    val_split_fraction=0.03865,
):
    """Alpaca: 52,000 instructions with answers by text-davinci-003, cleaned."""


class Alpaca2k(HubDataSet, train={"alpaca2k": "hf:mhenrichsen/alpaca_2k_test"}, val_split_fraction=0.05):
    """2,000 rows of Alpaca, the data set of most recipes.

    Args:
        file_url: Ignored; accepted for configurations of LitGPT, which ignores it as well.
        file_name: Ignored, like file_url.
    """

    def __init__(self, file_url: Optional[str] = None, file_name: Optional[str] = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class AlpacaGPT4(
    OneFile,
    train={
        "alpaca_gpt4_data.json": "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/"
        "alpaca_gpt4_data.json"
    },
    val_split_fraction=0.03847,
):
    """Alpaca's 52,000 instructions with answers by GPT-4."""


class Dolly(
    OneFile,
    train={"databricks-dolly-15k.jsonl": "hub:databricks/databricks-dolly-15k/databricks-dolly-15k.jsonl"},
    columns={"context": "input", "response": "output"},
    val_split_fraction=0.1,
):
    """Dolly: 15,000 instructions and answers, written by employees of Databricks."""


class LongForm(
    PublishedDataSet,
    train={"train.json": "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset/train.json"},
    val={"val.json": "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset/val.json"},
    columns={"input": "instruction"},
    prompt_style="longform",
):
    """LongForm: human-written texts with generated instructions. It has validation rows of its own."""


class FLAN(PublishedDataSet, train={}, columns={"inputs": "instruction", "targets": "output"}, prompt_style="flan"):
    """FLAN: many language tasks, written as instructions. It has validation rows of its own.

    Args:
        subsets: Comma-separated names, such as aeslc_10templates,cola_10templates. Default: all, many gigabytes.
        url: Address of a folder with the files in train/ and test/. Default: the published one.
    """

    def __init__(self, subsets: Optional[str] = None, url: Optional[str] = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if url and not re.match(r"https?://", url):
            raise UserError(f"--data.url {url}: expected an address that begins with https://.")
        self.subsets = SUBSETS if subsets is None else [name.strip() for name in subsets.split(",")]
        unknown = [f"{name!r}.{nearest(name, SUBSETS)}" for name in self.subsets if name not in SUBSETS]
        if unknown:
            raise UserError(f"--data.subsets: FLAN does not have {' '.join(unknown)}")
        published = hub_url("Muennighoff/flan", "").rstrip("/")
        place = "hub:Muennighoff/flan" if url in (None, published, LITGPT_FLAN) else str(url).rstrip("/")
        self.train, self.val = (
            {f"{subset}_{split}.jsonl": f"{place}/{split}/{subset}_{split}.jsonl" for subset in self.subsets}
            for split in ("train", "test")
        )


@dataclass(frozen=True)
class PairSource(RowSource):
    """Conversations, each as several rows: one for each prompt with its answer.

    Args:
        turns: The column with the turns.
    """

    turns: str = ""

    def all_rows(self) -> Rows:
        for where, fields in super().all_rows():
            turns = fields.get(self.turns) if isinstance(fields, dict) else None
            if not isinstance(turns, list) or len(turns) < 2:
                yield where, fields
                continue
            system = turns[:1] if isinstance(turns[0], dict) and turns[0].get("role") == "system" else []
            for i in range(len(system), len(turns) - 1, 2):
                yield f"{where}, turn {i // 2 + 1}", {**fields, self.turns: [*system, *turns[i : i + 2]]}


class Conversations(HubDataSet):
    """Conversations of one or several turns.

    Args:
        include_multiturn_conversations: Keep all turns instead of only the first prompt and answer. If the prompt style
            supports a single turn only, each prompt with its answer becomes a row of its own.

    Attributes:
        turns: The column of the files with the turns.
    """

    turns: str

    def __init__(self, include_multiturn_conversations: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.include_multiturn_conversations = include_multiturn_conversations
        self.as_pairs = False

    def load(self, tokenizer: Tokenizer, folder: Path, *args: Any, **kwargs: Any) -> TokenizedDataset:
        style = choose_style(self.prompt_style, folder, chat=True)
        self.as_pairs = self.include_multiturn_conversations and getattr(style, "close", "") is None
        return super().load(tokenizer, folder, *args, **kwargs)

    def source(self, name: str, address: str) -> RowSource:
        source = super().source(name, address)
        return PairSource(**vars(source), turns=self.turns) if self.as_pairs else source


class Deita(
    Conversations,
    train={"train_sft": "hf:HuggingFaceH4/deita-10k-v0-sft:train_sft"},
    val={"test_sft": "hf:HuggingFaceH4/deita-10k-v0-sft:test_sft"},
):
    """Deita: 10,000 conversations, selected for complexity and quality. It has validation rows of its own."""

    turns = "messages"

    def adapt(self, fields: dict[str, Any]) -> Optional[dict[str, Any]]:
        messages = fields.get("messages")
        if not isinstance(messages, list):
            return fields  # not a conversation: `recognize` reports it
        if not self.include_multiturn_conversations:
            has_system = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
            messages = messages[: 2 + has_system]
        return {"messages": messages}


class LIMA(Conversations, train={"train.jsonl": "hub:GAIR/lima/train.jsonl"}, val_split_fraction=0.1):
    """LIMA: 1,030 curated conversations. The data set is gated: accept its terms on the Hugging Face hub first.

    Args:
        access_token: Access token for the Hugging Face hub. Default: the environment variable HF_TOKEN.
    """

    turns = "conversations"
    hint = (
        "The data set is gated: accept its terms at https://huggingface.co/datasets/GAIR/lima, "
        "then set HF_TOKEN or --data.access_token."
    )

    def __init__(self, access_token: Optional[str] = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.access_token = access_token

    def token(self) -> Optional[str]:
        return self.access_token or os.environ.get("HF_TOKEN")

    def adapt(self, fields: dict[str, Any]) -> Optional[dict[str, Any]]:
        texts = fields.get("conversations")
        if not isinstance(texts, list):
            return fields  # not a conversation: `recognize` reports it
        if not self.include_multiturn_conversations:
            texts = texts[:2]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        return {"messages": messages} if len(messages) > 1 else None


class TinyStories(DataModule):
    """TinyStories: stories by GPT-3.5 and GPT-4 in the vocabulary of small children, as plain text for pretraining.

    Args:
        download_dir: Folder for the archive and its files, several gigabytes. The first file is for validation.
        data_path: The same under LitGPT's name; takes precedence.
    """

    packed = True

    def __init__(
        self, download_dir: Path = Path("data/tinystories"), data_path: Optional[Path] = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.download_dir = Path(data_path or download_dir)

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        folder = self.download_dir / "TinyStories_all_data"
        if not folder.is_dir():
            archive = self.download_dir / f"{folder.name}.tar.gz"
            unpack(fetch(hub_url("roneneldan/TinyStories", archive.name), archive), folder)
        files = sorted(folder.glob("data*.json"))
        if len(files) < 2:
            raise UserError(f"{folder} has {len(files)} files data*.json; expected at least 2. Remove the folder.")
        val, *train = [RowSource(file, columns={"text": "story"}, form="text") for file in files]
        return train, [val]


def or_alpaca(data: Optional[DataModule]) -> DataModule:
    """The selected data set, or LitGPT's default with a note on stderr."""
    if data is not None:
        return data
    remark("no --data: using LitGPT's default, Alpaca's 52,000 rows. For your own: --data FILE")
    return Alpaca()
