"""Credentials: hidden in texts and plain data, and in all that a process prints."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from partial_lora.credentials import HIDDEN, as_it_is, redact_output, redacted

SECRET = "correct.horse/battery+staple"


_SECRET = (
    "HF_TOKEN WANDB_API_KEY MLFLOW_TRACKING_PASSWORD AWS_SECRET_ACCESS_KEY MY_SECRET_WORD SOME_APIKEY Github_Token"
)


@pytest.mark.parametrize("name", _SECRET.split())
def test_values_of_variables_that_are_called_secret_are_hidden(monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redacted(f"no access with {SECRET}, sorry") == f"no access with {HIDDEN}, sorry"


@pytest.mark.parametrize("name", ["HF_HOME", "TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "SECRETARY"])
def test_values_of_other_variables_are_not(monkeypatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redacted(SECRET) == SECRET


def test_a_short_value_is_no_secret_and_of_two_the_longer_is_hidden_whole(monkeypatch) -> None:
    monkeypatch.setenv("A_TOKEN", "digits")
    monkeypatch.setenv("B_TOKEN", "longsecret")
    monkeypatch.setenv("C_TOKEN", "longsecret-and-more")
    assert redacted("task=digits longsecret-and-more") == f"task=digits {HIDDEN}"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345", HIDDEN),
        ("key=sk-proj-abcdefghijklmnop0123 is wrong", f"key={HIDDEN} is wrong"),
        ("AKIAIOSFODNN7EXAMPLE", HIDDEN),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", HIDDEN),
        ("github_pat_11ABCDEFG0123456789_abcdef", HIDDEN),
        ("https://user:pa:ss@host/x", f"https://{HIDDEN}@host/x"),
        ("https://token@host:80/x?y=1", f"https://{HIDDEN}@host:80/x?y=1"),
        (
            "http://h/f?page=2&token=abc&X-Amz-Signature=0f#part",
            f"http://h/f?page=2&token={HIDDEN}&X-Amz-Signature={HIDDEN}#part",
        ),
        ("h/f?api_key=abc&sig=x%2By", f"h/f?api_key={HIDDEN}&sig={HIDDEN}"),
        ("h/f?Password=a.b", f"h/f?Password={HIDDEN}"),
        ("{'Authorization': 'Bearer abcdef.0123456789'}", f"{{'Authorization': 'Bearer {HIDDEN}'}}"),
    ],
)
def test_what_looks_like_a_credential_is_hidden(text: str, left: str) -> None:
    assert redacted(text) == left
    assert redacted(left) == left


@pytest.mark.parametrize(
    "text",
    [
        "model.weights=meta-llama/Llama-3.1-8B",
        "https://huggingface.co/meta-llama/Llama-3.1-8B?revision=main",
        "/work/data/hf_cache/monkey?monkey=3",
        "someone@example.org wrote of task-specific heads",
        "the SHA-256 of model.onnx is 198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        "bearer of news",
    ],
)
def test_harmless_text_stays_as_it_is(text: str) -> None:
    assert redacted(text) == text


def test_plain_data_keeps_its_shape(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    given = {"a": {"b": [SECRET, 1, None, 0.5, True]}, "c": (f"x{SECRET}",)}
    assert redacted(given) == {"a": {"b": [HIDDEN, 1, None, 0.5, True]}, "c": [f"x{HIDDEN}"]}
    assert given["c"] == (f"x{SECRET}",)  # what it was given is not changed


def test_a_line_is_printed_when_it_ends_in_escapes_where_characters_are_few(monkeypatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    redact_output()
    print("train …")
    assert sys.stdout.buffer.getvalue() == b"train \\u2026\n"


def test_all_that_a_process_prints_is_without_credentials(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    beneath = {name: io.StringIO() for name in ("stdout", "stderr")}
    for name, stream in beneath.items():
        monkeypatch.setattr(sys, name, stream)
    redact_output()
    redact_output()  # a second time changes nothing
    handler = logging.StreamHandler(sys.stderr)
    handler.handle(logging.makeLogRecord({"msg": "refused: %s", "args": (SECRET,)}))
    print("printed", SECRET)
    sys.stdout.writelines([f"{SECRET}\n"])
    as_it_is(sys.stdout).write(f"repeated {SECRET}\n")  # as `predict` repeats its inputs
    try:
        raise ValueError(f"in a traceback: {SECRET}")
    except ValueError:
        sys.excepthook(*sys.exc_info())
    assert beneath["stdout"].getvalue() == f"printed {HIDDEN}\n{HIDDEN}\nrepeated {SECRET}\n"
    written = beneath["stderr"].getvalue()
    assert written.startswith(f"refused: {HIDDEN}\nTraceback")
    assert f"ValueError: in a traceback: {HIDDEN}" in written
    assert not sys.stdout.isatty()  # in all else the stream beneath
