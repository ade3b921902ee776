"""What sample.py does with prompts: `Chat` answers them as turns of one conversation, `Texts` continues each by itself.

Both are given `session`, which makes an empty `decoding.Session`, and `answer`, which streams the continuation of one
to stdout and returns a `sample.Answer`.
"""

import json
import math
import sys
from contextlib import suppress
from pathlib import Path

import chat
import data

COMMANDS = """\
/help             this list
/reset            begin anew, with the same system text
/system TEXT      begin anew with this system text; without TEXT: with none
/depth K          take K steps a token from now on; auto: the model decides
/temperature X    0 takes the most likely token
/save FILE.jsonl  write the conversation to a new file, as prepare_chat.py reads it
/quit             or Ctrl-D, or Ctrl-C at the prompt; in an answer Ctrl-C stops the answer"""


def lines(hint):
    """What is typed at a prompt, line by line, until Ctrl-D or Ctrl-C; `hint` is shown first, on stderr."""
    with suppress(ImportError):
        import readline  # noqa: F401  gives `input` line editing and a history; absent on Windows
    print(hint, file=sys.stderr)
    while True:
        try:
            line = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print(f"error: byte {error.start} of this line is not UTF-8; set the terminal to UTF-8", file=sys.stderr)
            continue
        yield line


def clean(text):
    """`text` without the halves of surrogate pairs, which stand for bytes that were not UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


class Texts:
    """Prompts that are documents of their own, each continued by at most `max_tokens`."""

    def __init__(self, session, answer, max_tokens):
        self.session, self.answer, self.max_tokens = session, answer, max_tokens

    def say(self, prompt):
        """Continue the prompt. Returns the `Answer`."""
        document = [data.EOT, *data.load_tokenizer().encode_ordinary(prompt)]
        session = self.session(len(document) + self.max_tokens)  # more memory is never filled
        session.feed(document)
        return self.answer(session)

    def loop(self):
        """Continue what is typed, until an empty line."""
        for line in lines("Ctrl-C stops an answer; an empty line or Ctrl-D quits."):
            if not line:
                return
            self.say(line)


class Chat:
    """A conversation. messages: its turns, without those that no text came of; session: the same, as the model read it.
    args: the options of sample.py, of which `depth` and `temperature` can be changed by commands."""

    def __init__(self, args, session, answer):
        self.args, self.new_session, self.answer = args, session, answer
        self.reset(args.system)

    def reset(self, system):
        """Begin anew with this system text, or None."""
        self.session, self.system = self.new_session(), system
        self.messages = [{"role": "system", "content": clean(system.strip())}] if system else []

    def say(self, text):
        """Answer a user's turn. Returns the `Answer`; what Ctrl-C or a stop string left of it stays in the history.

        The <|endoftext|> that opens the conversation is fed once, the one that ends an answer never (see chat.py)."""
        turn, before = [{"role": "user", "content": clean(text.strip())}], len(self.session.text)
        ids, _ = chat.encode(turn if before else self.messages + turn, answer=True)
        self.session.feed(ids.tolist()[1 if before else 0 :])
        tokenizer, asked = data.load_tokenizer(), len(self.session.text)
        made = self.answer(self.session)
        if tokenizer.decode(self.session.text[asked:]) != made.text:  # cut at a stop string: the user saw less
            self.session.replace(self.session.text[:asked] + tokenizer.encode_ordinary(made.text))
        self.messages += turn
        if made.text.strip():
            self.messages.append({"role": "assistant", "content": made.text.strip()})
        if before <= self.args.memory < len(self.session.text):
            print(f"the conversation has outgrown the memory of {self.args.memory} tokens: the model no longer sees "
                  "its beginning; --memory M makes it longer", file=sys.stderr)  # fmt: skip
        return made

    def loop(self):
        """Answer what is typed, and carry out commands, which start with /."""
        for line in lines("Ctrl-C stops an answer; /help lists the commands; Ctrl-D quits."):
            name, _, value = line.strip().partition(" ")
            if name == "/quit":
                return
            if not name.startswith("/"):
                if name:
                    self.say(line)
                continue
            try:
                print(self.command(name, value.strip()), file=sys.stderr)
            except (ValueError, OSError) as error:
                print(f"error: {error}", file=sys.stderr)

    def command(self, name, value):
        """Carry out a command; returns what to print. Raises ValueError and OSError."""
        if name == "/reset":
            self.reset(self.system)
            return "a new conversation" + (", with the same system text" if self.system else "")
        if name == "/system":
            self.reset(value or None)
            return "a new conversation, " + ("with this system text" if value else "without system text")
        if name == "/depth":
            self.session.depth = self.args.depth = self.depth(value)
            return f"depth {value}"
        if name == "/temperature":
            self.args.temperature = temperature(value)
            return f"temperature {value}"
        if name == "/save":
            return self.save(value)
        return COMMANDS if name == "/help" else f"no command {name}; these there are:\n{COMMANDS}"

    def depth(self, value):
        depths = self.session.model.config.depths
        if value == "auto":
            return None
        if not value.isdecimal() or int(value) not in depths:
            raise ValueError(f"/depth '{value}' must be a whole number in {depths[0]}..{depths[-1]}, or auto")
        return int(value)

    def save(self, value):
        """Write the messages as one line of JSON; a file that is there stays."""
        if not value:
            raise ValueError("/save needs the name of a file")
        if all(message["role"] == "system" for message in self.messages):
            raise ValueError("/save: nothing has been said yet")
        try:
            with open(Path(value).expanduser(), "x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise ValueError(f"/save: {value} exists; give another name") from None
        return f"saved to {value}"


def temperature(value):
    """The number that was typed. Raises ValueError."""
    with suppress(ValueError):
        if 0 <= (number := float(value)) < math.inf:
            return number
    raise ValueError(f"/temperature '{value}' must be a number from 0 (greedy) up")
