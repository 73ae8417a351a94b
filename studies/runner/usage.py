"""The text of --help, and the errors of the command line's parser in words."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import docstring_parser

from studies.runner.options import ELSEWHERE, flag, words

WIDTH = 80

# Options that --help shows with their defaults alone; it describes the others.
GROUPS: Mapping[str, str] = {
    "data": "data_dir image_size image_range background label",
    "where": "device workers threads_per_run leave checkpoint_every storage tracking_uri "
    "study_name",
    "network": "model model_options hidden channels activation latent_size head latent",
    "loss": "kl_weight kl_normalization kl_warmup_epochs kl_cycles free_bits sigma likelihood "
    "binarization dequantize terms term_options",
    "optimiser": "optimizer learning_rate adam_betas adam_eps momentum weight_decay lr_schedule "
    "lr_milestones lr_factor lr_warmup_epochs clip_norm",
    "training": "epochs batch_size patience keep precision metric",
}

KINDS = {
    **{"INT": "a whole number", "[INT [INT ...]]": "whole numbers", "FLOAT": "a number"},
    "FLOAT FLOAT": "two numbers",
}

# Errors of tyro -> the same in words.
WORDS = {
    r"Unrecognized options: (?!-)(.*)": r"'\1': no option takes this value",
    r"Missing value for argument '(\S+)'.*": r"\1: give a value after it",
    r"Missing from .+?: (\S+) (.*?)\.? \(required\)": r"\1 is missing: \2",
    r"Error parsing (\S+): invalid literal.+: ('.*')": r"\1 \2: give a whole number",
    r"Error parsing (\S+): could not.+: ('.*')": r"\1 \2: give a number",
}


def short_help(
    command: str, question: str, options: type, settings: type, defaults: Mapping[str, str]
) -> str:
    """Return every option in groups, with its default: fewer than 40 lines of 80 columns.

    `defaults` are those that only the study has.
    """
    every: list[Any] = [*fields(options), *fields(settings)]
    docs = dict[str, str]()
    for kind in options.__mro__:
        for param in docstring_parser.parse(kind.__doc__ or "").params:
            docs.setdefault(param.arg_name, " ".join((param.description or "").split()))
    shown = dict[str, str]()
    for one in every:
        default = "" if one.default is False else " ".join(words(one.default or 0))
        if one.default in (None, ()):
            found = re.search(r"\(([^()]*)\)\.?$", docs.get(one.name, ""))  # what None means
            default = f"({found[1]})" if found else "none"
        shown[one.name] = defaults.get(one.name, one.metadata.get("default", default))
    asked = textwrap.wrap(question.strip().splitlines()[0], WIDTH)
    lines = [f"usage: {command} [OPTIONS]", "", *asked, ""]
    grouped = {"settings", *" ".join(GROUPS.values()).split()}
    described = [one.name for one in every if one.name in docs.keys() - grouped]
    for name in sorted(described, key=lambda name: name in ELSEWHERE):
        text = re.split(r"[:;.](?: |$)| \(", docs[name])[0]  # its first clause
        if shown[name] not in ("", "none"):
            text += f" (default: {shown[name].strip('()')})"
        lines += _wrapped(text, flag(name))
    lines.append("")
    for group, names in GROUPS.items():
        there = [f"{flag(name)} {shown[name]}".strip() for name in names.split() if name in shown]
        # Without a line break between an option and its default.
        text = "  ".join(entry.replace(" ", "\0") for entry in there)
        lines += [line.replace("\0", " ") for line in _wrapped(text, group)]
    return "\n".join([*lines, "", "--help-all describes every option."])


def _wrapped(text: str, name: str) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, f"{name:9}  ", " " * 11)
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.wrap(text)


def in_words(text: str, names: Sequence[str]) -> str:
    """Return an error of tyro's in words, with the option that was meant of those there are."""
    if found := re.match(r"Unrecognized options: (-[^=,\s]*)", text):
        near = difflib.get_close_matches(found[1].replace("_", "-"), map(flag, names), 1)
        return f"{found[1]}: no such option" + "".join(f" (did you mean {one}?)" for one in near)
    if found := re.match(r"invalid choice (.+?) for argument '(\S+?)'\. .* \((.*?)\)\.", text):
        choices = sorted({*re.findall("'(.*?)'", found[3])} - {"None"})
        return f"{found[2]} {found[1]}: choose one of {', '.join(choices)}"
    # Without the types that were tried one after the other.
    several = r"Error parsing (\S+): no type matching (?:{None}\|)?(.+?) could be .+? \[(.*?)\].*"
    if found := re.match(several, text):
        kind = found[2].strip("{}")
        return f"{found[1]} {found[3]}: give {KINDS.get(kind, kind)}"
    for pattern, said in WORDS.items():
        text = re.sub(pattern, said, text)
    return text
