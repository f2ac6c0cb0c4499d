"""The demo model's four tokenizers, trained on its captions; every Unicode text works in CLIP and Llama."""

import itertools
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from scripts.demo_model.captions import caption_of, sample_scene

CLIP_MAX_TOKENS = 128
MAX_TOKENS = 64
_NUM_CAPTIONS = 20_000
_CLIP_MERGES = 500
_LLAMA_PIECES = 800
_T5_PIECES = 700
_T5_SENTINELS = 100
# Some words beyond the grammar, so that other prompts do not fall apart into single bytes.
_PLAIN_ENGLISH = (
    "please show me the picture of a round thing that is coloured like the sky",
    "two objects and one more in front of it, next to each other, without any other shape",
    "a cat sitting under a tree near the house with a very nice view over the sea at night",
    "make it bright and simple, flat design, high quality, no text, minimal, solid colour",
)


@dataclass(frozen=True)
class PromptTokenizers:
    """The pipeline's `tokenizer`, `tokenizer_2`, `tokenizer_3` and `tokenizer_4`."""

    clip: CLIPTokenizer
    clip_2: CLIPTokenizer
    t5: T5Tokenizer
    llama: PreTrainedTokenizerFast


def train_tokenizers(seed: int) -> PromptTokenizers:
    """Train all four on captions that the seed decides."""
    rng = random.Random(f"{seed} tokenizers")
    captions = [caption_of(sample_scene(rng, 0.5), rng, 0.3) for _ in range(_NUM_CAPTIONS)]
    captions += list(_PLAIN_ENGLISH) * 200
    return PromptTokenizers(
        clip=_train_clip(captions),
        clip_2=_train_clip(captions),
        t5=_train_t5(captions),
        llama=_train_llama(captions),
    )


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(first, second) for first, second in json.loads(tokenizer.to_str())["model"]["merges"]]


def _train_clip(captions: list[str]) -> CLIPTokenizer:
    """Byte-level pieces with `</w>`, in the order of OpenAI's vocabulary."""
    untrained = CLIPTokenizer()
    learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.normalizer = untrained.backend_tokenizer.normalizer
    learner.pre_tokenizer = untrained.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + _CLIP_MERGES,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = _merges(learner)[:_CLIP_MERGES]
    pieces = alphabet + [f"{piece}</w>" for piece in alphabet] + [first + second for first, second in merges]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # Pairs are what the tokenizers library takes; transformers' hint knows only text.
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        model_max_length=CLIP_MAX_TOKENS,
    )


def _train_t5(captions: list[str]) -> T5Tokenizer:
    """A unigram model of whole English words and of Chinese pieces of up to two characters.

    Expectation maximisation on so repetitive a text keeps whole phrases and drops words, so the
    pieces are counted instead; printable ASCII keeps English prompts free of <unk>, since
    transformers gives T5 no byte fallback.
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        for word in re.findall(r"[A-Za-z]+", caption):
            counts[f"▁{word}"] += 2
            counts[word] += 1
        for run in re.findall(r"[^\x00-\x7f]+", caption):
            counts.update(run)
            counts.update(first + second for first, second in itertools.pairwise(run))
    total = sum(counts.values())
    scored = [(piece, math.log(count / total)) for piece, count in counts.most_common(_T5_PIECES)]
    rest = [chr(code) for code in range(33, 127)] + ["▁"]
    scored += [(piece, -12.0) for piece in rest if piece not in dict(scored)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    sentinels = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(_T5_SENTINELS))]
    return T5Tokenizer(
        vocab=special + scored + sentinels, extra_ids=_T5_SENTINELS, model_max_length=MAX_TOKENS
    )


def _train_llama(captions: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    begin, end = "<|begin_of_text|>", "<|eot_id|>"
    trainer = trainers.BpeTrainer(
        vocab_size=_LLAMA_PIECES,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[begin, end],
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=end, model_max_length=MAX_TOKENS
    )
