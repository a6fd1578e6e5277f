"""The command line as a user meets it: lines out, messages, exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mova import cli
from mova.demo import ANSWERS
from mova.demo.pictures import pictures
from mova.experts import OFFICIAL
from mova.pipeline import MoVAPipeline
from mova.router import Router

NAMES = [expert.name for expert in OFFICIAL]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good images in several modes, and files that are none."""
    path = tmp_path_factory.mktemp("images")
    image = pictures()[0].image.resize((90, 60))
    image.save(path / "good.png")
    for mode, name in (("L", "grey.png"), ("RGBA", "alpha.png"), ("P", "palette.png"), ("CMYK", "cmyk.jpg")):
        image.convert(mode).save(path / name)
    (path / "truncated.png").write_bytes((path / "good.png").read_bytes()[:1000])
    (path / "empty.png").touch()
    (path / "words.png").write_text("no image")
    (path / "folder.png").mkdir()
    return path


@pytest.fixture
def mova(capsys, folder, monkeypatch):
    """Run the command where the images are; returns the exit code, the lines and the messages."""
    monkeypatch.chdir(folder)

    def run(*args, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            cli.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture
def answer(mova, saved_model):
    """``mova answer`` with the small model; returns the exit code, the parsed lines and the messages."""

    def run(*args, model=saved_model, stdin: bytes = b""):
        code, out, err = mova("answer", "--model", model, "--max-new-tokens", 3, *args, stdin=stdin)
        return code, [json.loads(line) for line in out.split("\n") if line], err

    return run


def lines(*items):
    return "\n".join(json.dumps(item, ensure_ascii=False) for item in items).encode()


def asked(**fields):
    return {"image": "good.png", "question": "What?", **fields}


# What goes in and comes out.


def test_one_question_for_all_images(answer):
    code, out, err = answer("--image", "good.png", "--image", "grey.png", "--question", "What?", "--experts", "sam")
    assert code == 0 and err == ""
    assert [(line["image"], line["question"]) for line in out] == [("good.png", "What?"), ("grey.png", "What?")]


def test_all_questions_about_one_image(answer):
    code, out, _ = answer("--image", "good.png", "--question", "A?", "--question", "B?", "--experts", "none")
    assert code == 0 and [line["question"] for line in out] == ["A?", "B?"]


def test_a_line_has_the_answer_and_the_route(answer, saved_model, folder):
    _, (line,), err = answer("--image", "good.png", "--question", "What?")
    with pytest.warns(UserWarning, match="names no expert"):
        (expected,) = MoVAPipeline.from_pretrained(str(saved_model)).answer(
            [folder / "good.png"], ["What?"], max_new_tokens=3
        )
    assert line == asked(answer=expected.text, experts=[], router=expected.route.answer)
    assert re.fullmatch(r"mova: the router's answer names no expert.*\n", err)  # the documented fallback, in one line


def test_lines_from_standard_input_keep_order_fields_and_letters(answer):
    items = [asked(id=3, question="Où\u2028ça?"), asked(id=1, text="ignored"), {"image": "good.png", "text": "What?"}]
    code, out, _ = answer("--jsonl", "-", "--experts", "none", "--batch-size", 2, stdin=lines(*items))
    assert code == 0
    assert [{key: line[key] for key in item} for line, item in zip(out, items, strict=True)] == items
    assert out[2]["question"] == "What?"


def test_letters_are_not_escaped(mova, saved_model):
    _, out, _ = mova(
        "answer", "--model", saved_model, "--image", "good.png", "--question", "Où?", "--max-new-tokens", 1
    )
    assert '"Où?"' in out


def test_lines_of_a_file_into_a_file(answer, folder, tmp_path):
    image = str(folder / "good.png")
    (tmp_path / "in.jsonl").write_bytes(lines(asked(image=image), asked(image=image, experts=["sam"])))
    code, out, _ = answer("--jsonl", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--experts", "none")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert code == 0 and out == [] and [line["experts"] for line in written] == [[], ["sam"]]


def test_images_of_a_file_are_relative_to_it(answer, folder, tmp_path):
    (tmp_path / "deep").mkdir()
    shutil.copy(folder / "grey.png", tmp_path / "deep" / "near.png")
    items = [asked(image=image, experts=[]) for image in ("near.png", str(folder / "good.png"), "good.png")]
    (tmp_path / "deep" / "in.jsonl").write_bytes(lines(*items))
    code, out, _ = answer("--jsonl", tmp_path / "deep" / "in.jsonl")
    assert code == cli.SOME_FAILED and [line["image"] for line in out] == [item["image"] for item in items]
    assert ["error" in line for line in out] == [False, False, True]
    assert str(tmp_path / "deep" / "good.png") in out[2]["error"]


def test_all_experts_by_one_word(answer):
    _, (line,), _ = answer("--image", "good.png", "--question", "What?", "--experts", "all", "--num-beams", 2)
    assert line["experts"] == NAMES and line["router"] is None


@pytest.mark.parametrize("name", ["grey.png", "alpha.png", "palette.png", "cmyk.jpg"])
def test_other_modes_are_answered(answer, name):
    code, (line,), _ = answer("--image", name, "--question", "What?", "--experts", "none")
    assert code == 0 and "error" not in line


def test_streamed_text_is_on_standard_error(answer):
    code, (line,), err = answer("--image", "good.png", "--question", "What?", "--experts", "none", "--stream")
    assert code == 0 and err.strip() == line["answer"]


def test_route_says_which_and_why(mova, saved_model, monkeypatch):
    generate = Router.generate
    monkeypatch.setattr(Router, "generate", lambda *a, **k: ["G, C" for _ in generate(*a, **k)])
    code, out, _ = mova("route", "--model", saved_model, "--image", "good.png", "--question", "What?")
    line = json.loads(out)
    assert code == 0 and line["router"] == "G, C" and line["experts"] == ["sam", "codetr"]
    assert line["letters"] == dict(zip("ABCDEFG", NAMES, strict=True))
    gates = torch.tensor([line["gates"]["sam"], line["gates"]["codetr"]])
    assert gates.shape == (2, 3) and torch.allclose(gates.sum(0), torch.ones(3), atol=2e-4)


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_route_draws_a_figure(mova, saved_model, tmp_path, suffix, start):
    figure = tmp_path / f"figure.{suffix}"
    args = ("--image", "good.png", "--image", "empty.png", "--question", "What?", "--figure", figure)
    assert mova("route", "--model", saved_model, *args)[0] == cli.SOME_FAILED
    assert figure.read_bytes().startswith(start)


# One bad line costs no other.


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (asked(image="truncated.png"), "truncated.png"),
        (asked(image="empty.png"), "empty.png"),
        (asked(image="words.png"), "words.png"),
        (asked(image="folder.png"), "directory"),
        (asked(image="absent.png"), "must be a file that exists"),
        (asked(image="https://host/a.png"), "image must be a file of this machine, so download it first"),
        (asked(image="s3://bucket/a.png"), "so download it first"),
        (asked(image="data:image/png;base64,QUJD"), "so download it first"),
        (asked(question=" "), "question must be a string that is not empty"),
        (asked(question=None), "question must be a string that is not empty"),
        (asked(question="<image>"), "question must not contain <image>"),
        ({"question": "What?"}, "image must be a string that is not empty"),
        (asked(experts=["eagle"]), "experts must be in the pool"),
        (asked(experts="sam"), "experts must be 'all', 'none' or a sequence"),
        (asked(experts=5), "experts must be a sequence"),
    ],
)
def test_a_bad_item_has_its_error_and_the_others_their_answers(answer, bad, message):
    good = asked(experts=[])
    code, out, err = answer("--jsonl", "-", stdin=lines(good, {"experts": [], **bad}, good))
    assert code == cli.SOME_FAILED and ["error" in line for line in out] == [False, True, False]
    assert message in out[1]["error"] and "answer" not in out[1]
    assert err == 'mova: 1 of 3 failed, see "error" in their lines\n'


@pytest.mark.parametrize("bad", [b'{"image":', b"[1]", b'{"image": "\xff"}', b"[" * 100_000])
def test_a_line_that_cannot_be_read_has_its_number(answer, bad):
    good = lines(asked(experts=[]))
    code, out, _ = answer("--jsonl", "-", stdin=b"\n".join([good, b"", bad, good]))
    assert code == cli.SOME_FAILED and ["error" in line for line in out] == [False, True, False]
    assert out[1]["line"] == 3 and "line 3 cannot be read" in out[1]["error"]


def test_half_a_surrogate_pair_is_an_error_and_stays_as_it_came(answer, tmp_path):
    stdin = b'{"image": "good.png", "question": "\\ud800"}'
    code, _, _ = answer("--jsonl", "-", "--output", tmp_path / "out.jsonl", stdin=stdin)
    written = (tmp_path / "out.jsonl").read_bytes()
    assert code == cli.SOME_FAILED and b'"\\ud800"' in written and "surrogates" in json.loads(written)["error"]


def test_failed_lines_can_be_tried_again(answer):
    code, (line,), _ = answer("--jsonl", "-", stdin=lines(asked(error="of the last run", experts=[])))
    assert code == 0 and "error" not in line


def test_a_broken_expert_is_named_before_any_item_is_answered(answer, saved_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(saved_model, model)
    os.truncate(model / "experts" / "vary" / "model.safetensors", 1000)
    code, out, err = answer("--jsonl", "-", model=model, stdin=lines(asked(experts=["codetr"])))
    assert code == cli.FAILED and not out
    assert "experts/vary/model.safetensors" in err and "Traceback" not in err


@pytest.fixture
def fails(monkeypatch):
    """Let ``pipeline.answer`` raise this where a question is "bad?"; returns the batches that it was given."""

    def fail(error):
        answer, batches = MoVAPipeline.answer, []

        def instead(self, images, questions, **arguments):
            batches.append(list(questions))
            if "bad?" in questions:
                raise error
            return answer(self, images, questions, **arguments)

        monkeypatch.setattr(MoVAPipeline, "answer", instead)
        return batches

    return fail


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB"), "out of memory: .* Tried to allocate"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), "out of memory: .*DefaultCPUAllocator"),
        (MemoryError(), "out of memory: .*MemoryError"),
        (IndexError("index out of range in self"), "IndexError: index out of range in self"),
        (ValueError("too long"), "too long"),
    ],
)
def test_one_bad_question_of_eight_costs_no_other(answer, fails, error, reason):
    batches = fails(error)
    items = [asked(question="bad?" if i == 5 else f"{i}?", experts=[]) for i in range(8)]
    code, out, _ = answer("--jsonl", "-", stdin=lines(*items))
    assert code == cli.SOME_FAILED and [i for i, line in enumerate(out) if "answer" not in line] == [5]
    assert re.fullmatch(f"{reason}.*", out[5]["error"]) and "\n" not in out[5]["error"]
    assert [len(batch) for batch in batches] == [8, 4, 4, 2, 1, 1, 2]  # in halves


def test_a_lack_of_memory_gives_the_kept_features_back(answer, fails, monkeypatch):
    cleared = []
    monkeypatch.setattr(MoVAPipeline, "clear", lambda self: cleared.append(len(self.cache)))
    fails(MemoryError())
    answer("--jsonl", "-", "--batch-size", 1, stdin=lines(asked(experts=[]), asked(question="bad?", experts=[])))
    assert cleared == [1]


def test_the_traceback_of_a_bug_is_on_standard_error(answer, fails):
    fails(ZeroDivisionError("of the test"))
    code, (line,), err = answer("--image", "good.png", "--question", "bad?")
    assert code == cli.SOME_FAILED and line["error"] == "ZeroDivisionError: of the test"
    assert err.startswith("Traceback") and "in instead" in err


def test_an_interrupt_is_no_error_of_a_line(answer, fails):
    fails(KeyboardInterrupt())
    code, out, _ = answer("--jsonl", "-", stdin=lines(asked(question="bad?"), asked()))
    assert (code, out) == (cli.INTERRUPTED, [])


def test_a_route_that_fails_costs_no_other(mova, saved_model, monkeypatch):
    route = MoVAPipeline.route

    def instead(self, images, questions):
        if "bad?" in questions:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return route(self, images, questions)

    monkeypatch.setattr(MoVAPipeline, "route", instead)
    stdin = lines(asked(), asked(question="bad?"), asked())
    code, out, _ = mova("route", "--model", saved_model, "--jsonl", "-", stdin=stdin)
    assert code == cli.SOME_FAILED
    assert ["error" in json.loads(line) for line in out.splitlines()] == [False, True, False]


def test_a_failed_batch_leaves_nothing_behind(answer, saved_model, monkeypatch):
    """The first batch fails in the midst of its second pass; the answers are those of a run without it."""
    good = [asked(question="A?", experts=["sam"]), asked(question="B?", experts=["vary"])]
    _, expected, _ = answer("--jsonl", "-", stdin=lines(*good))
    generate, calls = Router.generate, []

    def once(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert not any(module._forward_pre_hooks for module in self.model.adapter.modules())
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Router, "generate", once)
    code, found, _ = answer("--jsonl", "-", stdin=lines(*good))
    assert code == 0 and found == expected and len(calls) == 3


# What cannot be done at all: one message, before the work.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--question", "What?"], "image or jsonl must be given"),
        (["--image", "good.png"], "question must be given"),
        (["--image", "a", "--image", "b", "--image", "c", "--question", "A?", "--question", "B?"], "must be 1 or 3"),
        (["--image", "good.png", "--question", "What?", "--jsonl", "-"], "jsonl must be without"),
        (["--image", "http://host/a.png", "--question", "What?"], "so download it first, got 'http://host/a.png'"),
        (["--image", "*.tiff", "--question", "What?"], "no file matches this pattern"),
        (["--image", "good.png", "grey.png", "--question", "What?"], "--image must have one word: quote what"),
        (["--image=good.png", "grey.png", "--question", "What?"], "--image must have one word"),
        (["--image", "good.png", "--question", "What", "is", "it?"], "--question must have one word"),
        (["--jsonl", "a.jsonl", "b.jsonl"], "got 'b.jsonl'"),
        (["--jsonl", "absent.jsonl"], "absent.jsonl"),
        (["--jsonl", "-", "--output", "absent/out.jsonl"], "output must be a file in a directory that exists"),
        (["--jsonl", "-", "--batch-size", "0"], "batch-size must be at least 1"),
        (["--jsonl", "-", "--num-beams", "2", "--stream"], "stream must be without num-beams"),
        (["--jsonl", "-", "--device", "toaster"], "device must be one of this machine"),
        (["--jsonl", "-", "--experts", "eagle"], "experts must be in the pool"),
        (["--jsonl", "-", "--dtype", "int3"], "int3"),
    ],
)
def test_bad_arguments(answer, args, message):
    code, out, err = answer(*args)
    assert code == cli.FAILED and out == [] and message in err


def test_words_without_an_option(mova):
    code, _, err = mova("answer", "good.png", "grey.png")
    assert code == cli.FAILED and "answer must have options alone: quote what has spaces" in err


def test_a_file_may_have_a_name_like_a_pattern(answer, folder, tmp_path):
    shutil.copy(folder / "good.png", tmp_path / "a[1]?.png")
    code, _, _ = answer("--image", tmp_path / "a[1]?.png", "--question", "What?", "--experts", "none")
    assert code == 0


def test_a_figure_of_another_kind_is_refused(mova, saved_model):
    code, _, err = mova("route", "--model", saved_model, "--jsonl", "-", "--figure", "figure.txt")
    assert code == cli.FAILED and err == "mova: figure must end in one of .png, .svg, .pdf, got 'figure.txt'\n"


def _truncate(model):
    os.truncate(model / "model.safetensors", 1000)


def _drop_a_key(model):
    state = load_file(model / "model.safetensors")
    del state["adapter.pos_embed"]
    save_file(state, model / "model.safetensors", {"format": "pt"})


def _drop_the_processor(model):
    (model / "processor_config.json").unlink()


def _of_another_type(model):
    (model / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "cannot be loaded"),
        (_drop_a_key, "1 missing (adapter.pos_embed)"),
        (_drop_the_processor, "must have its processor"),
        (_of_another_type, "must be of the type mova, got 'llama'"),
        (shutil.rmtree, "must be a directory that exists"),
    ],
)
def test_a_damaged_model(answer, saved_model, tmp_path, damage, message):
    shutil.copytree(saved_model, tmp_path / "model")
    damage(tmp_path / "model")
    code, out, err = answer("--image", "good.png", "--question", "What?", model=tmp_path / "model")
    assert code == cli.FAILED and out == [] and message in err
    assert err.startswith("mova: ") and err.count("\n") == 1


# The other commands.


def test_info_of_a_model_says_what_is_on_disk(mova, saved_model, tmp_path):
    shutil.copytree(saved_model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "experts" / "sam")
    code, out, _ = mova("info", "--model", tmp_path / "model")
    weights = dict(re.findall(r"^(\w+) .* {2}(in model|missing|\d+\.\d MB)  ", out, re.MULTILINE))
    assert code == 0 and weights.pop("clip") == "in model" and weights.pop("sam") == "missing"
    assert sorted(weights) == sorted(set(NAMES) - {"sam"})


def test_info_without_a_model_has_the_known_experts(mova):
    code, out, _ = mova("info")
    assert code == 0 and all(f"\n{name} " in out for name in NAMES) and "weights" not in out


def test_demo_answers_what_it_learned(mova, tmp_path):
    code, out, err = mova("demo", "--output", tmp_path / "demo.png")
    assert code == 0 and err == "" and "random weights" in out
    for picture in pictures():
        assert f"-> {', '.join(picture.experts) or 'no expert'}: {ANSWERS[picture.name]}\n" in out
    assert Image.open(tmp_path / "demo.png").size[0] == 2000


@pytest.mark.parametrize("command", ["answer", "route", "convert", "info", "demo"])
def test_help(mova, command):
    code, out, _ = mova(command, "--help")
    assert code == 0 and f"usage: mova {command}" in out


# In a process of its own.


@pytest.fixture
def endless(saved_model, folder):
    """``mova answer`` with more lines than anyone waits for; stops when the test ends."""
    item = {"image": str(folder / "good.png"), "question": "Où?", "experts": "all"}
    (folder / "endless.jsonl").write_bytes(lines(*[item] * 5000))
    args = ["answer", "--model", saved_model, "--jsonl", folder / "endless.jsonl", "--batch-size", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "mova", *args],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job ignores the interrupt, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        yield process
        process.kill()


def test_an_interrupt_ends_it_quietly(endless):
    assert json.loads(endless.stdout.readline())["question"] == "Où?"
    endless.send_signal(signal.SIGINT)
    _, err = endless.communicate(timeout=120)
    assert endless.returncode == cli.INTERRUPTED and err == b""


def test_a_reader_that_leaves_ends_it_quietly(endless):
    assert "Où?".encode() in endless.stdout.readline()
    endless.stdout.close()
    assert endless.wait(timeout=120) == cli.NO_READER and endless.stderr.read() == b""
