"""Train small vision-language models that speak of shapes' colours, for measuring guidance with pictures.

Pictures and captions are made here (``shapes.py``), so nothing is needed but time::

    python examples/train_shapes.py --out shapes --minutes 24

Three models come out, LLaVAs trained from scratch, vision tower and all: the policy; a smaller reference; and the
reference's twin, tuned by DPO (arXiv 2305.18290) to prefer right colours, as TITA's guide is (arXiv 2510.21794, beta
0.1). Policy and reference are fluent and often wrong: they learn from noisy captions, in which three colours in ten
are the shape's usual one, whatever the picture shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from shapes import QUESTION, SIDE, WORDS, Findings, Scene, caption, check, draw, new_scene
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from training import (
    BOS,
    DEVICE,
    EOS,
    PAD,
    Batch,
    autocast,
    by_clock,
    by_steps,
    export,
    fit,
    next_token_loss,
    steps_done,
    tensor,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

PATCH = 8
BATCH, PAIRS, BETA = 32, 4096, 0.1
LEARNED, PREFERRED, HELD, MEASURED = range(4)  # streams of pictures that never meet


def new_processor() -> LlavaProcessor:
    """A token for each word, ``<s>`` in front; a picture as it is, a token for each of its patches."""
    ids = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", "<image>", *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    pictures = CLIPImageProcessor(do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        pictures, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def new_model(hidden: int, layers: int, seeing: int) -> LlavaForConditionalGeneration:
    """``layers`` of width ``hidden`` read; two of width ``seeing`` see."""
    vision = CLIPVisionConfig(
        hidden_size=seeing,
        intermediate_size=4 * seeing,
        num_hidden_layers=2,
        num_attention_heads=seeing // 32,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    settings = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1, tie_word_embeddings=True
    )
    model: Any = LlavaForConditionalGeneration(settings)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    return model.to(DEVICE)


NEW = {
    "policy": lambda: new_model(160, 3, 64),
    "reference": lambda: new_model(96, 2, 64),
    "twin": lambda: new_model(96, 2, 64),
}


def scenes(stream: int, seed: int, start: int = 0) -> Iterator[tuple[Scene, np.ndarray, np.random.Generator]]:
    """Scenes without end, each with its picture and the generator that both came of."""
    number = start
    while True:
        chance = np.random.default_rng((seed, stream, number))
        scene = new_scene(chance)
        yield scene, draw(scene, chance), chance
        number += 1


def normal(pictures: list[np.ndarray]) -> torch.Tensor:
    """Pixels as the processor gives them: ``[B, 3, SIDE, SIDE]``, -1 to 1."""
    return tensor(np.stack(pictures).transpose(0, 3, 1, 2) / 127.5 - 1, np.float32)


def captions_to_learn(processor: LlavaProcessor, seed: int, start: int) -> Iterator[Batch]:
    """Prompts with their noisy captions ``[B, T]``, and pictures; all captions have the same length."""
    pictures = scenes(LEARNED, seed, start)
    while True:
        rows = [(caption(scene, chance, noisy=True), picture) for scene, picture, chance in take(pictures, BATCH)]
        yield encoded(processor, [text for text, _ in rows]), normal([picture for _, picture in rows])


def pairs_to_prefer(processor: LlavaProcessor, seed: int) -> Iterator[Batch]:
    """Right captions above the same ones with noise ``[2 B, T]``, and pictures ``[B, ...]``."""
    pictures = scenes(PREFERRED, seed)
    while True:
        rows: list[tuple[str, str, np.ndarray]] = []
        while len(rows) < BATCH:
            scene, picture, chance = next(pictures)
            forms = int(chance.integers(2**32))
            right, noisy = (caption(scene, np.random.default_rng(forms), noisy) for noisy in (False, True))
            if right != noisy:
                rows.append((right, noisy, picture))
        texts = [right for right, _, _ in rows] + [noisy for _, noisy, _ in rows]
        yield encoded(processor, texts), normal([picture for _, _, picture in rows])


def take(pictures: Iterator[Any], count: int) -> list[Any]:
    return [next(pictures) for _ in range(count)]


def encoded(processor: LlavaProcessor, texts: list[str]) -> torch.Tensor:
    """A prompt, a caption and the end in each row."""
    seen = f"{'<image> ' * (SIDE // PATCH) ** 2}{QUESTION} "
    return tensor(processor.tokenizer([f"{seen}{text} </s>" for text in texts])["input_ids"])


def answer_logits(model: Any, ids: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that predict the answers' tokens, and these tokens."""
    length = ids.shape[1] - (SIDE // PATCH) ** 2 - 1 - len(QUESTION.split())
    with autocast():
        logits = model(ids, pixel_values=pixels, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]
    return logits.float(), ids[:, -length:]


def caption_loss(model: Any, batch: Batch) -> torch.Tensor:
    return next_token_loss(*answer_logits(model, *batch))


def preference_loss(model: Any, reference: Any, batch: Batch) -> torch.Tensor:
    """DPO: ``-log sigmoid(beta (log-ratio of the preferred - log-ratio of the other))``."""
    ids, pixels = batch

    def logprob(one: Any) -> torch.Tensor:
        logits, tokens = answer_logits(one, ids, torch.cat([pixels, pixels]))
        return logits.log_softmax(-1).gather(-1, tokens[..., None]).sum((1, 2))

    with torch.no_grad():
        before = logprob(reference)
    preferred, other = (logprob(model) - before).chunk(2)
    return -F.logsigmoid(BETA * (preferred - other)).mean()


@torch.no_grad()
def findings(model: Any, processor: LlavaProcessor, seed: int, count: int = 100) -> Findings:
    """One sampled caption of each of ``count`` held-out pictures, checked and added up."""
    shown = take(scenes(HELD, seed), count)
    ids = encoded(processor, [""] * count)[:, :-1]
    pixels = normal([picture for _, picture, _ in shown])
    answers = model.generate(ids, pixel_values=pixels, do_sample=True, top_k=0, max_new_tokens=48)[:, ids.shape[1] :]
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    found = [check(scene, text) for (scene, _, _), text in zip(shown, texts, strict=True)]
    return Findings(*map(sum, zip(*found, strict=True)))


def train(name: str, minutes: float, args: argparse.Namespace, processor: LlavaProcessor) -> None:
    """The policy or the reference, from noisy captions."""
    torch.manual_seed(args.seed)
    model, checkpoint = NEW[name](), args.work / f"{name}.pt"
    # A resumed run must not meet the same pictures again.
    rows = captions_to_learn(processor, args.seed, BATCH * steps_done(checkpoint, args.resume))
    fit(
        model,
        lambda: next(rows),
        lambda batch: caption_loss(model, batch),
        lambda: str(findings(model, processor, args.seed)),
        by_clock(minutes),
        3e-3,
        checkpoint,
        args.resume,
    )


def tune(args: argparse.Namespace, processor: LlavaProcessor) -> None:
    """The twin, from the reference and pairs."""
    reference, model = NEW["reference"]().eval(), NEW["reference"]()
    for one in (reference, model):
        one.load_state_dict(torch.load(args.work / "reference.pt", map_location=DEVICE)["model"])
    pairs = pairs_to_prefer(processor, args.seed)
    fit(
        model,
        lambda: next(pairs),
        lambda batch: preference_loss(model, reference, batch),
        lambda: str(findings(model, processor, args.seed)),
        by_steps(PAIRS // BATCH),
        args.lr_twin,
        args.work / "twin.pt",
        False,
    )


def main() -> None:
    """Train, export, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("shapes"), help="where the models go")
    parser.add_argument("--work", type=Path, default=Path("shapes_work"), help="checkpoints")
    parser.add_argument("--stage", default="all", help="all, policy, reference, twin or export")
    parser.add_argument("--minutes", type=float, default=24.0, help="of the policy; its reference gets a third as many")
    parser.add_argument("--lr-twin", type=float, default=3e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    processor = new_processor()
    for name, minutes in (("policy", args.minutes), ("reference", args.minutes / 3)):
        if args.stage in ("all", name):
            train(name, minutes, args, processor)
    if args.stage in ("all", "twin"):
        tune(args, processor)
    if args.stage in ("all", "export"):
        processor.save_pretrained(args.out)
        for name, make in NEW.items():
            state = export(make(), args.work / f"{name}.pt", args.out / name, torch.float32)
            processor.tokenizer.save_pretrained(args.out / name)  # says that the three share a vocabulary
            model = LlavaForConditionalGeneration.from_pretrained(args.out / name).to(DEVICE).eval()
            said = findings(model, processor, args.seed, 300)
            print(f"{name}: {model.num_parameters():,} parameters, {state['steps']:.0f} steps, {said}")


if __name__ == "__main__":
    main()
