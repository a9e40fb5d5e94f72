"""FLAN."""

from pathlib import Path
from typing import Any, Optional

from litgpt.data.base import DataModule, RowSource
from litgpt.data.download import fetch, hub_url
from litgpt.errors import UserError, nearest

NAMES = {"inputs": "instruction", "targets": "output"}
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


class FLAN(DataModule):
    """FLAN: many tasks of language, each written as instructions; its validation rows are its own.

    Args:
        mask_prompt: Whether only the answers are trained, not the prompts.
        prompt_style: The name of a style; chat for the checkpoint's chat template; auto for that or, without
            one, alpaca.
        subsets: Names with commas between them, such as aeslc_10templates,cola_10templates; all by default, which is
            many gigabytes.
        download_dir: Where the files are kept.
    """

    def __init__(
        self,
        mask_prompt: bool = False,
        prompt_style: str = "flan",
        subsets: Optional[str] = None,
        download_dir: Path = Path("data/flan"),
        **kwargs: Any,
    ) -> None:
        super().__init__(mask_prompt=mask_prompt, prompt_style=prompt_style, **kwargs)
        self.subsets = SUBSETS if subsets is None else [name.strip() for name in subsets.split(",")]
        unknown = [f"{name!r}.{nearest(name, SUBSETS)}" for name in self.subsets if name not in SUBSETS]
        if unknown:
            raise UserError(f"--data.subsets names what FLAN does not have: {' '.join(unknown)}")
        self.download_dir = Path(download_dir)

    def sources(self) -> tuple[list[RowSource], Optional[list[RowSource]]]:
        return self.of_split("train"), self.of_split("test")

    def of_split(self, split: str) -> list[RowSource]:
        files = [f"{subset}_{split}.jsonl" for subset in self.subsets]
        return [RowSource(fetch(hub_url("Muennighoff/flan", f"{split}/{f}"), self.download_dir / f)) for f in files]

    def adapt(self, fields: dict[str, Any]) -> Optional[dict[str, Any]]:
        return {NAMES.get(name, name): value for name, value in fields.items()}
