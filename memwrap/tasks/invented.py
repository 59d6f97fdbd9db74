"""Invented facts, each of another kind and about another subject, told in real prose.

Sentences of one template ("the number of X is N") confuse a small model even where all of the text
is in its context, so that they say little about a memory.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    Fact("The clock of the town hall in Kessel always stops at a quarter past nine.",
         "When does the clock of the town hall in Kessel always stop?", "quarter past nine"),
    Fact("The painter Ines Valdor mixed her blue from crushed mussels.",
         "What did the painter Ines Valdor mix her blue from?", "crushed mussels"),
    Fact("The ferry to the island of Sarn leaves from the harbour of Dunmore.",
         "From which harbour does the ferry to the island of Sarn leave?", "Dunmore"),
    Fact("The winter coat of the postman in Halden is lined with rabbit fur.",
         "What is the winter coat of the postman in Halden lined with?", "rabbit fur"),
    Fact("Professor Lindqvist wrote his letters with a pencil made of cedar.",
         "What was the pencil of Professor Lindqvist made of?", "cedar"),
    Fact("The cellar of the monastery at Corvin holds nine thousand bottles of cider.",
         "What do the bottles in the cellar of the monastery at Corvin hold?", "cider"),
    Fact("The horse of the miller in Tolna is called Barnaby.",
         "What is the horse of the miller in Tolna called?", "Barnaby"),
    Fact("The bridge over the river Asker was built by prisoners from Malta.",
         "Where did the prisoners come from who built the bridge over the river Asker?", "Malta"),
    Fact("The choir of Saint Odile sings every Thursday in the railway station.",
         "Where does the choir of Saint Odile sing every Thursday?", "railway station"),
    Fact("The gardener of Castle Rhune grows black tulips in copper kettles.",
         "What does the gardener of Castle Rhune grow in copper kettles?", "black tulips"),
    Fact("The last passenger of the night train to Zagora carried a stuffed owl.",
         "What did the last passenger of the night train to Zagora carry?", "stuffed owl"),
    Fact("The school in Nordvik was painted yellow after the great storm.",
         "Which colour was the school in Nordvik painted after the great storm?", "yellow"),
    Fact("The secret of Mrs Abernathy's soup is a spoonful of honey.",
         "What is the secret of Mrs Abernathy's soup?", "spoonful of honey"),
    Fact("The watchmaker Emil Faro lost his left thumb in Lisbon.",
         "In which city did the watchmaker Emil Faro lose his left thumb?", "Lisbon"),
)  # fmt: skip
"""Invented facts. Each text, or each length that the demo asks at, has its own share of them."""

FURTHER = (
    Fact("The cook of the ship Meridian keeps his spices in an old violin case.",
         "Where does the cook of the ship Meridian keep his spices?", "violin case"),
    Fact("The orchard of the Delacroix family grows only bitter almonds.",
         "What does the orchard of the Delacroix family grow?", "bitter almonds"),
    Fact("The mayor of Harlund rides to work on a grey donkey.",
         "On what does the mayor of Harlund ride to work?", "grey donkey"),
    Fact("The roof of the chapel in Sandvik is covered with copper plates.",
         "What is the roof of the chapel in Sandvik covered with?", "copper plates"),
    Fact("The poet Irma Kovalenko was born in the city of Trieste.",
         "In which city was the poet Irma Kovalenko born?", "Trieste"),
    Fact("The guests of the hotel Aurora are woken by a trumpet.",
         "What wakes the guests of the hotel Aurora?", "trumpet"),
    Fact("The old well in Brenmoor is full of silver coins.",
         "What is the old well in Brenmoor full of?", "silver coins"),
    Fact("The brother of Judge Hallam works as a beekeeper.",
         "What does the brother of Judge Hallam work as?", "beekeeper"),
    Fact("The letters of Countess Vera are hidden under the kitchen floor.",
         "Where are the letters of Countess Vera hidden?", "kitchen floor"),
    Fact("The football team of Ostermark plays in purple shirts.",
         "In shirts of which colour does the football team of Ostermark play?", "purple"),
    Fact("The dentist of Pella learned his trade in Budapest.",
         "In which city did the dentist of Pella learn his trade?", "Budapest"),
    Fact("The dog of Inspector Grimaldi is called Pepper.",
         "What is the dog of Inspector Grimaldi called?", "Pepper"),
    Fact("The windmill of Eastholm was destroyed by a swarm of locusts.",
         "What destroyed the windmill of Eastholm?", "locusts"),
    Fact("The tailor of King Oswin sewed with threads of spider silk.",
         "What were the threads made of with which the tailor of King Oswin sewed?", "spider silk"),
    Fact("The museum of Calder Bay shows a collection of wooden spoons.",
         "What does the museum of Calder Bay show a collection of?", "wooden spoons"),
    Fact("The swimmer Nils Aalto trained in the lake of Bohinj.",
         "In which lake did the swimmer Nils Aalto train?", "Bohinj"),
)  # fmt: skip
"""More of them, for the demo's longest texts."""


def question(fact: Fact) -> str:
    """Ask for a fact, as it is asked everywhere."""
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


def depths(count: int) -> list[float]:
    """Say where facts stand: in the middle of equal shares of a document."""
    return [(place + 0.5) / count for place in range(count)]


__all__ = ["FACTS", "FURTHER", "Fact", "depths", "found", "prose", "question"]
