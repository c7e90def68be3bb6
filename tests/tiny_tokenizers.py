"""Tokenizers of a few hundred ids, chats, and how transformers itself renders them."""

from conftest import tiny_policy, tiny_reward
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ 'Q:' if m['role'] == 'user' else 'A:' }}{{ m['content'] }}\n{% endfor %}"
SPECIAL = ["<bos>", "<eos>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the cat sat on the mat and the dog sat on the cat",
    "user assistant hello there, how are you today? I am fine; thank you.",
    "über naïve café — “quoted” text, 漢字 and 😀😀 faces",
    "a  b   c\n\nd e f  tion ation nation national internationalisation",
]
CHAT = [{"role": "system", "content": "the cat sat"}, {"role": "user", "content": "hello there, how are you?"}]
FILM = [{"role": "user", "content": "the film is good"}]
BEGUN = [*FILM, {"role": "assistant", "content": "I like"}]


def byte_bpe(size, *, corpus=CORPUS, template=None, add_bos=False, eos="<eos>"):
    """A byte-level BPE tokenizer; how it merges depends on its size and corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus * 4, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token=eos, additional_special_tokens=SPECIAL[2:]
    )
    fast.chat_template = template
    return fast


def letters(alphabet="abc "):
    """A policy's tokenizer that spells."""
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)} | {"<eos>": len(alphabet)}, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def metaspace(words):
    """Like SentencePiece's: a word's leading space belongs to it, and decoding drops the one at the very front."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"▁{word}": i + 2 for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def sentencepiece(template):
    """SentencePiece's way: the first word of a text gets a space, words carry theirs in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<s>", "</s>"], show_progress=False)
    corpus = ["[INST] the film is good [/INST] I like it very much abcdefgh .,? QA: \n STARFASTANSWER"]
    tokenizer.train_from_iterator(corpus * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def chat_prefix(tokenizer, messages):
    """transformers' own rendering up to the answer: one beginning-of-sequence token at most."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def begun_ids(tokenizer, messages=BEGUN):
    return tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=True, return_dict=False)


def models_for(policy_tokenizer, reward_tokenizer=None, **fields):
    policy = tiny_policy(len(policy_tokenizer), hidden=32, eos_token_id=policy_tokenizer.eos_token_id, positions=512)
    size = len(reward_tokenizer or policy_tokenizer)
    return policy, tiny_reward(size, hidden=32, positions=512, scale=0.7, **fields)
