"""Masks and matchers: what is forbidden, behind guesses too; the same answers with speculation and after preemption."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path

import pytest
import torch
from byte_vocabulary import ByteVocabulary
from harness import Harness, drive
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model

from server.api.call_format import Tool
from server.api.tool_formats import FORMATS
from server.core import FinishReason, Sequence, mask_bytes
from server.engine import mask, structured
from server.engine.notation import Constraint, Kind
from server.engine.sampler import Draw
from server.engine.structured import CompiledGrammar, GrammarCompiler, TokenMatcher
from server.errors import BadRequest, Overloaded

WORDS = ("ab", "abc", '{"', '": ')
VOCABULARY = ByteVocabulary(*WORDS)
VOCAB = 263  # of the model: one id more than the vocabulary has
REGEX = "(ab|a{3,9}b?|[0-9]{4}){2,30}z"


def make(kind: Kind, text: str) -> CompiledGrammar:
    compiler = GrammarCompiler(VOCABULARY, vocab_size=VOCAB, eos_token_ids=[VOCABULARY.EOS])
    return asyncio.run(compiler.compile(Constraint(kind, text, "field")))


def masks_of(matcher: TokenMatcher, output: list[int], drafts: list[int]) -> list[set[int] | None]:
    """The ids that may come at each place; None where nothing was written."""
    bits = torch.full((1 + len(drafts), mask_bytes(VOCAB)), 0xFF, dtype=torch.uint8)
    matcher.fill(output, drafts, [bits[i].data_ptr() for i in range(len(bits))])
    rows = [{i for i in range(VOCAB) if row[i // 8] >> (i % 8) & 1} for row in bits]
    return [None if len(row) == VOCAB else row for row in rows]


def ids(text: str) -> list[int]:
    return [2 + byte for byte in text.encode()]


def test_what_may_come_is_what_continues_a_match() -> None:
    matcher = make("choice", '["abc", "abd", "x"]').start()
    word = {name: 258 + i for i, name in enumerate(WORDS)}
    assert masks_of(matcher, [], []) == [{*ids("ax"), word["ab"], word["abc"]}]
    assert masks_of(matcher, [word["ab"]], []) == [set(ids("cd"))]
    assert masks_of(matcher, [word["ab"], *ids("d")], []) == [{VOCABULARY.EOS}], "complete: only the end may come"


def test_the_end_may_come_only_where_the_text_is_complete() -> None:
    matcher = make("regex", "a(bc)*").start()
    assert masks_of(matcher, ids("a"), []) == [{VOCABULARY.EOS, *ids("b")}]
    assert masks_of(matcher, ids("ab"), []) == [set(ids("c"))]


def test_masks_behind_guesses_are_those_of_the_text_with_them() -> None:
    grammar = make("regex", REGEX)
    text = ids("ab0123aaab")
    for known in range(len(text)):
        for count in range(4):
            matcher, drafts = grammar.start(), text[known : known + count]
            guessed = masks_of(matcher, text[:known], drafts)
            expected = [masks_of(grammar.start(), text[: known + i], [])[0] for i in range(len(drafts) + 1)]
            assert guessed == expected
            assert masks_of(matcher, text[: known + 1], []) == masks_of(grammar.start(), text[: known + 1], [])


def test_nothing_is_said_behind_a_guess_that_cannot_come() -> None:
    matcher = make("regex", "abz?").start()
    allowed = masks_of(matcher, ids("a"), ids("bqz"))
    assert allowed == [set(ids("b")), {VOCABULARY.EOS, *ids("z")}, None, None]
    assert masks_of(matcher, ids("ab"), [VOCABULARY.EOS, 5])[:2] == [{VOCABULARY.EOS, *ids("z")}, {VOCABULARY.EOS}]
    assert masks_of(matcher, ids("abz"), []) == [{VOCABULARY.EOS}], "guesses were taken back"
    assert matcher.failure is None


def test_a_token_that_does_not_match_is_a_failure_and_not_an_exception() -> None:
    matcher = make("regex", "ab").start()
    assert masks_of(matcher, ids("x"), []) == [None]
    assert matcher.failure is not None
    assert masks_of(matcher, ids("xy"), []) == [None]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.randoms(use_true_random=False))
def test_apply_forbids_exactly_the_others(num_rows: int, vocab: int, rng: random.Random) -> None:
    logits = torch.randn(num_rows, vocab)
    rows = sorted(rng.sample(range(num_rows), rng.randint(1, num_rows)))
    bits = torch.randint(0, 256, (len(rows), mask_bytes(vocab)), dtype=torch.uint8)
    changed = logits.clone()
    mask.apply(changed, torch.tensor(rows), bits.flatten())
    for row in range(num_rows):
        for token in range(vocab):
            masked = row in rows and not bits[rows.index(row), token // 8] >> (token % 8) & 1
            assert changed[row, token] == (float("-inf") if masked else logits[row, token])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_ban_of_another_kind_gives_way_to_the_only_token_left(temperature: float, top_p: float) -> None:
    allowed = 7
    params = {"temperature": temperature, "top_p": top_p, "min_tokens": 5, "eos_token_ids": frozenset({allowed})}
    sequence = Harness.sequence(Harness.__new__(Harness), [3, 4], **params)
    bits = torch.zeros(1, mask_bytes(VOCAB), dtype=torch.uint8)
    bits[0, allowed // 8] = 1 << allowed % 8
    masks = mask.Masks(torch_rows(0), bits)
    [token] = Draw(torch.randn(1, VOCAB), [sequence], masks).read()
    assert token.token_id == allowed


def torch_rows(*rows: int):  # type: ignore[no-untyped-def]
    from array import array

    return array("q", rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model("llama").save_pretrained(path)
    return path


PROMPTS = [[17, 40, 41, 99] * 4, [5, 6, 7], [9] * 20, [*range(30, 60)]]


def matched(folder: Path, grammar: CompiledGrammar | None, **options: object) -> tuple[Harness, list[Sequence]]:
    """Two sequences under the grammar between two without one."""
    harness = Harness(folder, **options)  # type: ignore[arg-type]
    ends = frozenset({VOCABULARY.EOS})
    made = []
    for i, prompt in enumerate(PROMPTS):
        asked = grammar if i % 2 else None
        made.append(
            harness.sequence(prompt, str(i), max_tokens=40, temperature=0.9, seed=i, grammar=asked, eos_token_ids=ends)
        )
    return harness, harness.run(made)


def outputs(sequences: list[Sequence]) -> list[list[int]]:
    return [s.token_ids[s.num_prompt_tokens :] for s in sequences]


def check_match(sequence: Sequence) -> None:
    text = VOCABULARY.text(sequence.token_ids[sequence.num_prompt_tokens :])
    if sequence.finish_reason is FinishReason.STOP:
        assert re.fullmatch(REGEX, text)
    else:
        assert sequence.finish_reason is FinishReason.LENGTH
        assert make("regex", REGEX).start().failure is None


def test_speculation_and_preemption_change_nothing(folder: Path) -> None:
    grammar = make("regex", REGEX)
    _, plain = matched(folder, grammar)
    for sequence in plain[1::2]:
        check_match(sequence)
    guessing, speculated = matched(folder, grammar, speculative_ngram=4)
    assert guessing.scheduler.drafter is not None and guessing.scheduler.drafter.num_draft_tokens > 0
    assert outputs(speculated) == outputs(plain)
    small, preempted = matched(folder, grammar, num_blocks=14, block_size=8, admission_reserve=0.0)
    assert small.scheduler.num_preemptions > 0, "the test must force a preemption"
    assert outputs(preempted) == outputs(plain)


def test_neighbours_draw_what_they_draw_without_it(folder: Path) -> None:
    _, free = matched(folder, None)
    _, beside = matched(folder, make("regex", REGEX))
    assert outputs(free)[::2] == outputs(beside)[::2]
    assert outputs(free)[1::2] != outputs(beside)[1::2], "the grammar changed nothing: the test shows nothing"


def test_a_sequence_that_cannot_be_matched_ends_alone(folder: Path) -> None:
    class Broken:
        param = "field"

        def start(self) -> Broken:
            return self

        failure: str | None = None

        def fill(self, output_ids: list[int], draft_ids: list[int], masks: list[int]) -> None:
            if len(output_ids) == 3:
                self.failure = "too complex"

    harness = Harness(folder)
    healthy = harness.sequence(PROMPTS[0], "healthy", max_tokens=12)
    broken = harness.sequence(PROMPTS[1], "broken", max_tokens=12, grammar=Broken())
    found = drive(harness.scheduler, harness.runner, [healthy, broken])
    assert healthy.finish_reason is FinishReason.LENGTH and healthy.num_output_tokens == 12
    assert broken.finish_reason is FinishReason.GRAMMAR
    last = [output for output in found if output.request_id == "broken"]
    assert [output.token_id is None for output in last] == [False, False, False, True]
    assert last[-1].error == "too complex"


def test_what_cannot_be_compiled_says_why() -> None:
    cases: list[tuple[Kind, str, str]] = [
        ("regex", "(a", "unclosed"),
        ("regex", "[^\\s\\S]", "no text matches"),
        ("grammar", "start: start", "no text matches"),
        ("grammar", "root ::= missing", "missing"),
        ("json_schema", json.dumps({"type": "array", "uniqueItems": True}), '"uniqueItems"'),
        ("json_schema", json.dumps({"$ref": "https://example.org/x"}), "not present"),
        ("regex", "a" * 200_000, "limit is 131072"),
    ]
    for kind, text, reason in cases:
        with pytest.raises(BadRequest, match=re.escape(reason)) as caught:
            make(kind, text)
        assert caught.value.param == "field"


def test_a_model_without_an_end_is_refused() -> None:
    compiler = GrammarCompiler(VOCABULARY, vocab_size=VOCAB, eos_token_ids=[])
    with pytest.raises(BadRequest, match="end-of-sequence"):
        asyncio.run(compiler.compile(Constraint("regex", "a", "field")))


def test_one_request_does_not_use_up_the_states_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(structured.LIMITS, "max_lexer_states", 60)
    greedy, later = make("regex", "[a-z]{100}"), make("regex", "[a-z]{100}")
    first = greedy.start()
    assert any(masks_of(first, ids("q" * count), []) == [None] for count in range(100)) and first.failure is not None
    assert masks_of(later.start(), ids("q"), []) != [None]


def test_a_control_token_may_mark_calls() -> None:
    control = 0
    tool = Tool("f", {"type": "object", "additionalProperties": False})
    text = FORMATS["mistral"].optional([tool], parallel=False, controls={"[TOOL_CALLS]": control})
    matcher = make("grammar", text).start()
    [first] = masks_of(matcher, [], [])
    assert first is not None and {control, *ids("a[")} <= first and not {*ids("{"), VOCABULARY.EOS} & first
    assert masks_of(matcher, [control], []) == [set(ids("["))]
    call = ids('[{"name": "f", "arguments": {}}]')
    assert masks_of(matcher, [control, *call], []) == [{VOCABULARY.EOS}]
    free = make("grammar", text).start()
    [later] = masks_of(free, ids("text ["), [])
    assert later is not None and {control, VOCABULARY.EOS, *ids("x")} <= later


def test_too_many_compilations_at_once_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.structured.MAX_PENDING", 2)
    compiler = GrammarCompiler(VOCABULARY, vocab_size=VOCAB, eos_token_ids=[VOCABULARY.EOS])

    async def flood() -> list[object]:
        made = [compiler.compile(Constraint("regex", "a" * (i + 1), "field")) for i in range(12)]
        return list(await asyncio.gather(*made, return_exceptions=True))

    results = asyncio.run(flood())
    assert any(isinstance(result, CompiledGrammar) for result in results)
    refused = [result for result in results if isinstance(result, Overloaded)]
    assert refused and all(error.code == "too_many_grammars" for error in refused)
    assert isinstance(asyncio.run(compiler.compile(Constraint("regex", "b", "field"))), CompiledGrammar)
