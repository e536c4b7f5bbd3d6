"""Prompt templates and topics, for experiments that need chats about different subjects."""

from __future__ import annotations

TEMPLATES = (
    "Explain {topic} to a child in two sentences.",
    "What is {topic}? Answer in one sentence.",
    "Give one example of {topic} from daily life.",
    "Name one common mistake about {topic}.",
    "Write two tips for someone who wants to learn about {topic}.",
    "Why does {topic} matter? Answer briefly.",
)
TOPICS = {
    "start": (
        "tides", "compound interest", "bread dough", "friction", "vaccines", "rainbows",
        "traffic jams", "rust", "photosynthesis", "democracy", "sleep", "volcanoes", "inflation",
        "recycling", "magnetism", "poetry", "chess", "earthquakes", "memory", "composting",
        "satellites", "allergies", "glaciers", "probability", "batteries", "honesty", "deserts",
        "budgeting", "migration of birds", "gravity", "fermentation", "lighthouses",
    ),
    "second": (
        "thunder", "mortgages", "yeast", "erosion", "antibiotics", "eclipses", "roundabouts",
        "soap", "pollination", "elections", "dreams", "coral reefs", "taxes", "plastic waste",
        "compasses", "rhyme", "jazz", "avalanches", "habits", "gardening", "telescopes", "asthma",
        "rivers", "averages", "solar panels", "patience", "rainforests", "insurance",
        "hibernation", "levers", "cheese", "bridges",
    ),
    "heldout": (
        "fog", "interest rates", "pasta", "static electricity", "fever", "shadows", "trains",
        "glass", "seeds", "courts", "yawning", "islands", "auctions", "paper", "maps", "drums",
    ),
}  # fmt: skip
"""Disjoint topics for a first training, a second training, and evaluation."""
