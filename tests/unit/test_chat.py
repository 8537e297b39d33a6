"""Token ids and loss masks, made visible: what counts stands in [brackets] in the expectations."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from data.chat import TEMPLATES, ChatEncoder, load_tokenizer, template_name
from data.encoded import EncodedDemonstration, EncodedPreference, EncodedPrompt, fit_row
from data.errors import UserError
from data.rows import Demonstration, Message, Preference, Prompt, RowError
from tests.tiny import tiny_tokenizer

SHARED = Path(__file__).parents[3] / "shared"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is missing")

LLAMA2_LIKE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token if loop.first else '' }}[Q] {{ m['content'] }} [A]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_SYSTEM = "{{ raise_exception('no system turns') if messages[0]['role'] == 'system' else '' }}" + TEMPLATES["simple"]


def say(role: str, content: str) -> Message:
    return Message(role=role, content=content)


QUESTION = [say("user", "red?")]
TURNS = [say("assistant", "yes"), say("user", "dog?"), say("assistant", "no")]


def saved(tokenizer: Any, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def byte_level(template: str | None = None, **special: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    for name, token in special.items():
        if token is not None and token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [token]})
        setattr(tokenizer, name, token)
    tokenizer.chat_template = template or TEMPLATES["simple"]
    return tokenizer


def sentencepiece_like() -> Any:
    """A tokenizer that, like Llama's, puts a space before every text it is given, and strips it when decoding."""
    words = ["<unk>", "<s>", "</s>", "▁", "\n", ":", "?", *"abcdefghijklmnopqrstuvwxyzAU"]
    pairs = [("▁", "y"), ("▁", "a"), ("n", "o"), ("▁", "no"), ("▁y", "e"), ("▁ye", "s")]
    vocabulary = {word: place for place, word in enumerate([*words, *("".join(pair) for pair in pairs)])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATES["simple"]
    return tokenizer


def encoder(tokenizer: Any, max_length: int = 512, overlong: Any = "drop") -> ChatEncoder:
    return ChatEncoder(tokenizer, max_length=max_length, overlong=overlong)


def shown(tokenizer: Any, tokens: list[int], mask: list[bool]) -> str:
    """The text of the tokens, each run that counts in [brackets]."""
    text, inside = "", False
    for token, counts in zip([*tokens, None], [*mask, False], strict=True):
        if counts != inside:
            text += "[" if counts else "]"
        inside = counts
        text += "" if token is None else tokenizer.decode([token])
    return text


def masked(tokenizer: Any, row: Demonstration) -> str:
    encoded = encoder(tokenizer).demonstration(row)
    return shown(tokenizer, encoded.tokens, encoded.loss_mask)


# --- masks


def test_a_plain_row_learns_its_response_and_the_eos() -> None:
    assert masked(byte_level(), Demonstration("the cat", " sat")) == "<s>the cat[ sat</s>]"


def test_eos_is_learned_where_pad_is_eos() -> None:
    tokenizer = byte_level(pad_token="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert masked(tokenizer, Demonstration("the cat", " sat")) == "<s>the cat[ sat</s>]"
    assert masked(tokenizer, Demonstration(QUESTION, TURNS[:1])).endswith("[yes</s>]")


def test_a_conversation_learns_its_assistant_turns_and_what_ends_them() -> None:
    row = Demonstration([say("system", "Hi."), *QUESTION], TURNS)
    assert masked(byte_level(), row) == (
        "<s>System:\nHi.\n\nUser:\nred?\n\nAssistant:\n[yes</s>]\n\nUser:\ndog?\n\nAssistant:\n[no</s>]"
    )


def test_assistant_turns_of_the_prompt_are_context() -> None:
    row = Demonstration([*QUESTION, *TURNS[:2]], TURNS[2:])
    assert masked(byte_level(), row) == ("<s>User:\nred?\n\nAssistant:\nyes</s>\n\nUser:\ndog?\n\nAssistant:\n[no</s>]")


def test_chatml_ends_a_turn_with_its_own_token() -> None:
    tokenizer = byte_level(TEMPLATES["chatml"], start="<|im_start|>", end="<|im_end|>")
    assert masked(tokenizer, Demonstration(QUESTION, TURNS)) == (
        "<s><|im_start|>user\nred?<|im_end|>\n<|im_start|>assistant\n[yes<|im_end|>]\n"
        "<|im_start|>user\ndog?<|im_end|>\n<|im_start|>assistant\n[no<|im_end|>]"
    )
    ends = tokenizer.convert_ids_to_tokens(list(encoder(tokenizer).end_token_ids))
    assert ends == ["</s>", "<|im_end|>"]
    # A plain row has no turns, so it ends with EOS under the same template.
    assert masked(tokenizer, Demonstration("the cat", " sat")) == "<s>the cat[ sat</s>]"


def test_a_template_that_renders_bos_gets_no_second_one() -> None:
    assert masked(byte_level(LLAMA2_LIKE), Demonstration(QUESTION, TURNS)) == (
        "<s>[Q] red? [A][ yes </s>][Q] dog? [A][ no </s>]"
    )
    assert masked(byte_level(), Demonstration("<s>the cat", " sat")) == "<s>the cat[ sat</s>]"


def test_a_template_without_an_end_token_gets_an_eos_at_the_end() -> None:
    assert masked(byte_level(NO_END), Demonstration(QUESTION, TURNS)) == (
        "<s>user: red?\nassistant: [yes]\nuser: dog?\nassistant: [no</s>]"
    )


def test_no_bos_where_bos_is_eos_and_the_tokenizer_adds_none() -> None:
    tokenizer = byte_level(bos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    assert masked(tokenizer, Demonstration("the cat", " sat")) == "the cat[ sat</s>]"
    tokenizer = byte_level(bos_token=None)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    assert masked(tokenizer, Demonstration("the cat", " sat")) == "the cat[ sat</s>]"


# --- segments


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
def test_a_prompt_is_the_beginning_of_every_row_it_begins(make: Any) -> None:
    tokenizer = make()
    encode = encoder(tokenizer)
    whole = encode.demonstration(Demonstration(QUESTION, TURNS)).tokens
    for num_turns in (1, 3):
        prompt = encode.prompt_tokens([*QUESTION, *TURNS][:num_turns])
        assert whole[: len(prompt)] == prompt
        assert tokenizer.decode(prompt).endswith("Assistant:\n")
    last = encode.response_tokens([*QUESTION, *TURNS[:2]], "no")
    assert whole[-len(last) :] == last
    assert encode.response_tokens([*QUESTION, *TURNS[:2]], "no", finished=False) == last[:-1]
    pair = encode.preference(Preference(QUESTION, [say("assistant", "yes")], [say("assistant", "no")]))
    assert pair.chosen[: pair.prompt_length] == pair.rejected[: pair.prompt_length] == encode.prompt_tokens(QUESTION)
    assert pair.chosen[pair.prompt_length :] == encode.response_tokens(QUESTION, "yes")


def test_a_response_is_a_continuation_where_the_tokenizer_begins_texts_with_a_space() -> None:
    tokenizer = sentencepiece_like()
    encode = encoder(tokenizer)
    prompt, response = encode.prompt_tokens("say"), encode.response_tokens("say", " yes")
    assert tokenizer.convert_ids_to_tokens(prompt + response) == ["<s>", "▁", "s", "a", "y", "▁yes", "</s>"]
    assert prompt + response[:-1] == tokenizer("say yes")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(encode.response_tokens("say", "yes"))[0] == "y"
    # Also within a conversation: only its very beginning has the space.
    row = encode.demonstration(Demonstration([say("user", "a")], [say("assistant", "no"), *TURNS[1:]]))
    assert [token[0] for token in tokenizer.convert_ids_to_tokens(row.tokens)].count("▁") == 1


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("text", [" yes", "yes", "  yes", "\nyes", "\n\nno", "a", "no\n", ""])
def test_responses_survive_the_way_there_and_back(make: Any, text: str) -> None:
    encode = encoder(make())
    tokens = encode.response_tokens("say", text)
    assert encode.decode_response(tokens) == text
    assert encode.decode_response([*tokens, *encode.response_tokens("say", "more")]) == text


def test_decoding_stops_at_the_first_of_the_end_tokens() -> None:
    tokenizer = byte_level(TEMPLATES["chatml"], start="<|im_start|>", end="<|im_end|>")
    ids = tokenizer("yes<|im_end|>\nno</s>", add_special_tokens=False)["input_ids"]
    assert encoder(tokenizer).decode_response(ids) == "yes"


def test_a_reward_model_reads_the_same_ids_as_its_training_rows() -> None:
    for template in (TEMPLATES["simple"], LLAMA2_LIKE, NO_END):
        encode = encoder(byte_level(template))
        trained_on = encode.demonstration(Demonstration(QUESTION, [say("assistant", "yes")])).tokens
        sampled = trained_on[len(encode.prompt_tokens(QUESTION)) :]
        text = encode.decode_response(sampled)
        question, plain = len(encode.prompt_tokens(QUESTION)), len(encode.prompt_tokens("the cat"))
        assert encode.score_tokens(QUESTION, text, finished=True) == (trained_on, question)
        assert encode.score_tokens("the cat", " sat", finished=False) == (encode.prompt_tokens("the cat sat"), plain)


def test_an_end_token_in_the_text_is_not_doubled() -> None:
    assert masked(byte_level(), Demonstration("the cat", " sat</s>")) == "<s>the cat[ sat</s>]"


# --- templates


def test_a_template_that_changes_earlier_turns_is_named() -> None:
    encode = encoder(byte_level(FORGETFUL))
    single = encode.demonstration(Demonstration(QUESTION, TURNS[:1]))
    assert shown(encode.tokenizer, single.tokens, single.loss_mask).endswith("<assistant>[<think></think>yes</s>]")
    with pytest.raises(UserError, match="earlier turns in another way"):
        encode.demonstration(Demonstration(QUESTION, TURNS))


def test_a_row_that_the_template_refuses_is_a_row_error() -> None:
    with pytest.raises(RowError, match="no system turns"):
        encoder(byte_level(NO_SYSTEM)).prompt_tokens([say("system", "Hi."), *QUESTION])


def test_a_broken_template_is_a_user_error() -> None:
    with pytest.raises(UserError, match="template"):
        encoder(byte_level("{% for m in %}"))
    with pytest.raises(UserError, match="leaves out"):
        encoder(byte_level("nothing but this"))


def test_which_template_is_used(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    bare = saved(tokenizer, tmp_path / "bare")
    tokenizer.chat_template = NO_END
    own = saved(tokenizer, tmp_path / "own")
    assert template_name(load_tokenizer(bare)) == "simple"
    assert load_tokenizer(own).chat_template == NO_END
    assert template_name(load_tokenizer(own)) == f"that of {own}"
    assert template_name(load_tokenizer(own, "simple")) == "simple"
    (tmp_path / "mine.jinja").write_text(LLAMA2_LIKE)
    assert load_tokenizer(own, str(tmp_path / "mine.jinja")).chat_template == LLAMA2_LIKE
    for wrong, word in [("chatml", "no token <|im_start|>"), ("alpaca", "neither a file nor one of simple, chatml")]:
        with pytest.raises(UserError, match=word.replace("|", r"\|")):
            load_tokenizer(own, wrong)


def test_a_tokenizer_is_completed_or_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    loaded = load_tokenizer(saved(tokenizer, tmp_path / "no-pad"))
    assert loaded.pad_token_id == loaded.eos_token_id == 1
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(saved(tokenizer, tmp_path / "no-eos"))
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        load_tokenizer(str(tmp_path / "nothing"))


# --- rows that are too long (ids: 0 is BOS)

DEMONSTRATION = EncodedDemonstration([0, 11, 12, 13, 21, 22], [False] * 4 + [True] * 2)
PAIR = EncodedPreference([0, 11, 12, 21, 22, 23], [0, 11, 12, 31], prompt_length=3, margin=0.5)
LONG_PROMPT = EncodedPrompt([0, 11, 12, 13], Prompt("q"))


@pytest.mark.parametrize("row", [DEMONSTRATION, PAIR, LONG_PROMPT])
def test_a_row_that_fits_is_left_alone(row: Any) -> None:
    for overlong in ("drop", "truncate_prompt", "truncate_response"):
        assert fit_row(row, max_length=6, overlong=overlong, bos=0) is row


def test_drop() -> None:
    for row in (DEMONSTRATION, PAIR):
        assert fit_row(row, max_length=5, overlong="drop", bos=0) is None


def test_truncate_prompt_cuts_the_left_behind_the_bos() -> None:
    def cut(row: Any, max_length: int, bos: int | None = 0) -> Any:
        return fit_row(row, max_length=max_length, overlong="truncate_prompt", bos=bos)

    assert cut(DEMONSTRATION, 4) == EncodedDemonstration([0, 13, 21, 22], [False] * 2 + [True] * 2)
    assert cut(DEMONSTRATION, 3) is None  # would leave nothing of the prompt but BOS
    assert cut(DEMONSTRATION, 3, bos=None).tokens == [13, 21, 22]
    # Both sides lose the same token, also the one that fits.
    assert cut(PAIR, 5) == EncodedPreference([0, 12, 21, 22, 23], [0, 12, 31], prompt_length=2, margin=0.5)
    assert cut(PAIR, 4) is None
    assert cut(LONG_PROMPT, 2).tokens == [0, 13]
    assert cut(LONG_PROMPT, 1) is None


def test_truncate_response_cuts_the_right() -> None:
    def cut(row: Any, max_length: int) -> Any:
        return fit_row(row, max_length=max_length, overlong="truncate_response", bos=0)

    assert cut(DEMONSTRATION, 5) == EncodedDemonstration([0, 11, 12, 13, 21], [False] * 4 + [True])
    assert cut(DEMONSTRATION, 4) is None
    assert (cut(PAIR, 4).chosen, cut(PAIR, 4).rejected) == ([0, 11, 12, 21], [0, 11, 12, 31])
    same_start = EncodedPreference([0, 11, 21, 22], [0, 11, 21, 23], prompt_length=2)
    assert cut(same_start, 3) is None
    assert cut(LONG_PROMPT, 3) is None


def test_what_was_cut_and_dropped_is_counted() -> None:
    short, long = Demonstration("the", " cat"), Demonstration("the cat sat on", " the mat")
    encode = encoder(byte_level(), max_length=6, overlong="truncate_prompt")
    assert encode.demonstration(long).length > 6
    for row in (short, long, Demonstration("a", " dog ran to the red house say yes")):
        encode.fit(encode.demonstration(row))
    counts = encode.counts
    assert (counts.kept, counts.dropped, counts.prompt_truncated, counts.response_truncated) == (2, 1, 1, 0)
    assert encode.prompt(Prompt("the cat sat on the mat"), 3) is not None
    assert (encode.counts.kept, encode.counts.prompt_truncated) == (3, 2)


# --- real tokenizers


@real_data
@pytest.mark.real_data
@pytest.mark.parametrize("name", ["models/stories3M-llama", "models/stories260K-llama", "tokenizers/gpt2"])
def test_real_tokenizers(name: str) -> None:
    tokenizer: Any = load_tokenizer(str(SHARED / name))
    encode = encoder(tokenizer)
    story = encode.prompt_tokens("Once upon") + encode.response_tokens("Once upon", " a time", finished=False)
    assert story == tokenizer("Once upon a time")["input_ids"]
    for text in (" a time", "a time", "\n\nLily", "  two", "'s", "é 你好…", "42"):
        assert encode.decode_response(encode.response_tokens("Once upon", text)) == text
    row = encode.demonstration(Demonstration(QUESTION, TURNS))
    num_bos = sum(token == tokenizer.bos_token_id for token in row.tokens)
    if "gpt2" in name:  # no BOS; pad and BOS are EOS, which ends both turns
        assert (tokenizer.pad_token_id, encode.end_token_ids, num_bos) == (50256, (50256,), 2)
    else:
        assert num_bos == 1
    learned = [token for token, counts in zip(row.tokens, row.loss_mask, strict=True) if counts]
    assert learned.count(tokenizer.eos_token_id) == 2
