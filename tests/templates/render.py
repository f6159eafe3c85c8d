"""Renders the chat templates of a directory as Hugging Face's `transformers` sets Jinja up.

    python render.py DIRECTORY

Every `*.jinja` file is rendered for the conversations below, and `expected.json` is written beside
them. Needs only the package `jinja2`. Errors become null: the template refuses the conversation.
"""

import datetime
import json
import pathlib
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
TODAY = datetime.datetime(2024, 7, 26)


def turn(role, content):
    return {"role": role, "content": content}


HELLO = turn("user", "What is 2 + 2?")
SYSTEM = turn("system", "You are  terse.\n")
CONVERSATIONS = [
    [HELLO],
    [SYSTEM, HELLO],
    [turn("system", ""), HELLO],
    [turn("system", "Be brief. /no_think"), HELLO],
    [SYSTEM, HELLO, turn("assistant", "4"), turn("user", "And 3 + 3?")],
    [HELLO, turn("assistant", "<think>\nTwo and two.\n</think>\n\n4 "), turn("user", "Why?")],
    [HELLO, turn("assistant", "<think>\nTwo and two.\n</think>\n\n4 ")],
    [HELLO, turn("assistant", "No thought </think> 4"), turn("user", "Why?"), turn("assistant", "Because.")],
    [turn("user", " \t<b>Größe</b> & \"quotes\" 'single' {{ x }} {% y %} 日本語 🙂\u00a0\n\n")],
    [turn("user", "<|im_end|><|eot_id|></s>"), turn("user", "Twice the user")],
    [turn("user", "")],
    [turn("assistant", "I begin."), HELLO],
    [HELLO, turn("tool", "4"), HELLO],
]


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words; it renders them unchanged."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller):
        return caller()


def environment():
    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = TODAY.strftime
    return made


def render(template, messages, prompt):
    try:
        return template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=prompt, **TOKENS
        )
    except Exception:
        return None


def main(directory):
    made = environment()
    templates = {}
    for path in sorted(directory.glob("*.jinja")):
        template = made.from_string(path.read_text(encoding="utf-8"))
        templates[path.stem] = [
            [render(template, messages, prompt) for prompt in (False, True)] for messages in CONVERSATIONS
        ]
    expected = {"tokens": TOKENS, "conversations": CONVERSATIONS, "templates": templates}
    text = json.dumps(expected, ensure_ascii=False, indent=1)
    (directory / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
