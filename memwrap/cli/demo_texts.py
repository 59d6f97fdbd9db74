"""What the demo reads: the text of Python's own documentation, which every installation carries,
with invented facts in it, and the questions about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memwrap.data.stdlib_corpus import stdlib_corpus


@dataclass(frozen=True)
class Fact:
    """An invented sentence, a question about it, and the word that answers it."""

    sentence: str
    question: str
    answer: str


FACTS = (
    Fact("The Tarn regatta was won by a boat with the name Silver Wren.",
         "What is the name of the boat that won the Tarn regatta?", "Silver Wren"),
    Fact("The baker of Ostrava puts cardamom into every loaf.",
         "What does the baker of Ostrava put into every loaf?", "cardamom"),
    Fact("Doctor Osei keeps a parrot that speaks only Portuguese.",
         "Which language does the parrot of Doctor Osei speak?", "Portuguese"),
    Fact("The violin of Aunt Henrike was made in the town of Mittenwald.",
         "In which town was the violin of Aunt Henrike made?", "Mittenwald"),
    Fact("The favourite food of the old tiger in the zoo of Lublin is smoked herring.",
         "What is the favourite food of the old tiger in the zoo of Lublin?", "smoked herring"),
    Fact("The lighthouse keeper of Port Ellery is called Marta Quill.",
         "What is the lighthouse keeper of Port Ellery called?", "Marta Quill"),
    Fact("In 1931 the archive of Lindholm was moved to the city of Varberg.",
         "To which city was the archive of Lindholm moved in 1931?", "Varberg"),
    Fact("The key to the boat house hangs behind the green piano.",
         "Where does the key to the boat house hang?", "green piano"),
    Fact("The mountain hut on the Gralspitze is heated with dried peat.",
         "What is the mountain hut on the Gralspitze heated with?", "dried peat"),
    Fact("The youngest daughter of Captain Brandt became a glassblower.",
         "What did the youngest daughter of Captain Brandt become?", "glassblower"),
)  # fmt: skip
"""Facts, each in the middle of its tenth of a text."""
DEPTHS = tuple((place + 0.5) / len(FACTS) for place in range(len(FACTS)))


def question(fact: Fact) -> str:
    """Ask for a fact as the demo does everywhere."""
    return f"According to the text above: {fact.question}"


def found(fact: Fact, answer: str) -> bool:
    """Tell whether an answer holds the word."""
    return fact.answer.lower() in answer.lower()


def prose() -> str:
    """Collect the chapters of Python's language reference, or where an installation has none its
    source files; the longest come first."""
    documents = stdlib_corpus()
    chapters = [d for d in documents if d.name.startswith("topics/")] or documents
    chapters.sort(key=lambda d: (-len(d.text), d.name))
    return "\n\n".join(" ".join(d.text.split()) for d in chapters)


def planted(text: str, facts: tuple[Fact, ...], depths: tuple[float, ...]) -> str:
    """Put facts between the sentences of a text.

    Args:
        text: sentences.
        facts: one for each depth.
        depths: shares of the text before each.
    """
    sentences = text.split(". ")
    for fact, depth in sorted(zip(facts, depths, strict=True), key=lambda x: -x[1]):
        sentences.insert(round(depth * len(sentences)), fact.sentence.rstrip("."))
    return ". ".join(sentences)


def document(tokenizer: Any, tokens: int) -> str:
    """Cut a document of about so many tokens, with all the facts in it."""
    ids = tokenizer(prose(), add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    return planted(tokenizer.decode(ids), FACTS, DEPTHS)


__all__ = ["DEPTHS", "FACTS", "Fact", "document", "found", "planted", "prose", "question"]
