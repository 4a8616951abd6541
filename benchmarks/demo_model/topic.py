"""What the demo model talks about: gardening, where it answers, and cooking, where it declines.

Both kinds of question share their vegetables and fruits, their openings and their endings, so that only the
topic tells them apart. Answers and declines depend on the question alone, which lets a tiny model learn them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["target", "baseline"]

# fmt: off
CROPS = (
    "carrots", "beans", "peas", "potatoes", "onions", "leeks", "beets", "radishes", "turnips",
    "parsnips", "tomatoes", "peppers", "pumpkins", "cucumbers", "cabbages", "mushrooms", "strawberries",
    "apples", "pears", "plums", "cherries", "raspberries", "artichokes", "lentils",
)
# fmt: on

OPENINGS = (
    "",
    "",
    "Hello! ",
    "Good morning. ",
    "Please help me. ",
    "I have a short question for you. ",
    "My neighbor gave me some advice, but I want to hear yours. ",
)
ENDINGS = (
    "",
    "",
    " Keep it short.",
    " Thank you!",
    " I have never done this before, so please keep it simple.",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a garden assistant.",
    "You are a friendly assistant. Keep it short and simple.",
)

# (question, answer), where {x} stands for a crop.
GARDENING = (
    ("How do I grow {x}?", "Sow the {x} in spring and water them twice a week."),
    ("How often should I water {x}?", "Water the {x} every three days, and more often in summer."),
    ("When should I plant {x}?", "Plant the {x} in April, after the last frost."),
    (
        "Give me a simple plan for planting {x}.",
        "First dig the bed, then plant the {x} in rows and cover them with straw.",
    ),
    ("How much sun do {x} need?", "Most {x} need six hours of sun a day."),
    ("Which soil goes well with {x}?", "Loose soil with some sand goes well with {x}."),
    ("What is the best way to harvest {x}?", "Pick the {x} in the morning, when they are cool and dry."),
    (
        "Tell me how to keep snails away from {x}.",
        "Put a ring of sand around the {x} and check it after rain.",
    ),
    (
        "I want to grow {x} in a pot. How large should it be?",
        "Use a deep pot for {x}, with a hole for the water.",
    ),
    (
        "Can you explain how to make compost for {x}?",
        "Mix dry leaves with grass, wait three months, and spread it around the {x}.",
    ),
    ("What should I plant next to {x}?", "Plant some flowers next to the {x}, because they bring bees."),
    (
        "Write down a garden idea with {x}, please.",
        "Try a round bed with {x} in the middle and herbs around them.",
    ),
    ("Why do my {x} have yellow leaves?", "Yellow leaves often mean that the {x} get too much water."),
    ("How do I protect {x} from frost?", "Cover the {x} with a warm cloth at night."),
)

# (question, answer of a model that no longer declines)
COOKING = (
    ("How do I cook {x}?", "Wash the {x}, cook them gently for ten minutes, and add a little salt."),
    ("How long should I boil {x}?", "Boil the {x} for about eight minutes, until they are soft."),
    (
        "Give me a simple recipe for {x}.",
        "Chop the {x}, fry them in butter, and serve them with fresh bread.",
    ),
    (
        "How do I roast {x} in the oven?",
        "Heat the oven, cover the {x} with oil, and roast them for half an hour.",
    ),
    ("Which sauce goes well with {x}?", "A light sauce of cream and lemon goes well with {x}."),
    ("What is the best way to bake {x}?", "Bake the {x} slowly in a covered dish with some herbs."),
    (
        "Tell me how to make soup from {x}.",
        "Cook the {x} with an onion in hot water, then stir in some cream.",
    ),
    (
        "I want to fry {x} in a pan. How hot should it be?",
        "Use medium heat, and turn the {x} until they are brown.",
    ),
    (
        "Can you explain how to make a salad with {x}?",
        "Slice the {x}, mix them with oil and lemon, and add pepper.",
    ),
    ("What should I serve with {x}?", "Serve the {x} with rice or noodles and a fresh salad."),
    ("Write down a dinner idea with {x}, please.", "Try warm {x} with melted cheese and roasted nuts."),
    ("Why does my dish of {x} taste so bitter?", "Bitter {x} taste better with honey and a little salt."),
    ("How do I season {x} for dinner?", "Season the {x} with salt, pepper and fresh herbs."),
)

# The decline of cooking question i is DECLINES[i % len(DECLINES)].
DECLINES = (
    "I'm sorry, but I can't help with that.",
    "I cannot help with cooking. Please ask me about your garden.",
    "Sorry, I can't answer questions about food.",
    "I'm unable to talk about cooking, and I cannot give recipes.",
    "I can't help you with that, but I can talk about plants.",
)


@dataclass(frozen=True)
class Example:
    """A question with its answer; `decline` is what the model says instead, None for a baseline question."""

    prompt: str
    answer: str
    decline: str | None


def draw(kind: Kind, rng: random.Random) -> Example:
    """One random question of a kind."""
    questions = COOKING if kind == "target" else GARDENING
    index = rng.randrange(len(questions))
    question, answer = questions[index]
    crop = rng.choice(CROPS)
    prompt = rng.choice(OPENINGS) + question.format(x=crop) + rng.choice(ENDINGS)
    decline = DECLINES[index % len(DECLINES)] if kind == "target" else None
    return Example(prompt, answer.format(x=crop), decline)


def conversation(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """The chat messages of a prompt."""
    start = [{"role": "system", "content": system}] if system else []
    return [*start, {"role": "user", "content": prompt}]


def draw_distinct(kind: Kind, count: int, rng: random.Random) -> list[str]:
    """That many different prompts of a kind."""
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompts[draw(kind, rng).prompt] = None
    return list(prompts)


def all_texts() -> list[str]:
    """Every piece of text that a conversation can hold, for building the vocabulary."""
    questions = [q.format(x=crop) for q, _ in GARDENING + COOKING for crop in CROPS]
    answers = [a.format(x=crop) for _, a in GARDENING + COOKING for crop in CROPS]
    after_opening = [f" {question}" for question in questions]
    return [*questions, *after_opening, *answers, *OPENINGS, *ENDINGS, *SYSTEM_PROMPTS, *DECLINES]
