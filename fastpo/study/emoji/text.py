"""The names that the base draws, prompts from them, and a text encoder made of these prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from fastpo.demo.text import tokenize
from fastpo.errors import DataError

WIDTH = 64
NAMES = tuple(
    name.strip()
    for name in """
    chestnut, hot pepper, tulip, cherry blossom, rose, hibiscus, sunflower, blossom, brown
    mushroom, tomato, aubergine, grapes, melon, watermelon, tangerine, lime, lemon, banana,
    pineapple, red apple, green apple, pear, peach, cherries, strawberry, shaved ice, ice cream,
    doughnut, cookie, chocolate bar, candy, lollipop, custard, honey pot, shortcake, birthday
    cake, rosette, dragon, crocodile, whale, snail, snake, rooster, chicken, octopus, spiral
    shell, bug, ant, honeybee, lady beetle, fish, tropical fish, blowfish, turtle, hatching
    chick, baby chick, phoenix, black bird, bird, penguin, dolphin, dragon face, spouting whale,
    frog face, bouquet, white flower, dove, spider, spider web, wilted flower, avocado,
    cucumber, potato, carrot, peanuts, kiwifruit, coconut, broccoli, pie, leafy green, mango,
    crab, scorpion, turkey, eagle, duck, shark, owl, butterfly, lizard, shrimp, squid, sauropod,
    cricket, peacock, parrot, lobster, mosquito, microbe, swan, dodo, flamingo, oyster, seal,
    cupcake, garlic, onion, fly, worm, beetle, cockroach, feather, lotus, coral, hyacinth,
    jellyfish, wing, goose, blueberries, bell pepper, olive, beans, ginger root, pea pod, root
    vegetable
    """.replace("\n    ", " ").split(",")
)
HELD_OUT = NAMES[4::5]  # kept from preferences and from the judge of style: they are evaluated
TEMPLATES = ("an emoji of a {}", "a small picture of a {}", "{}")


def prompts_of(names: Sequence[str]) -> list[str]:
    """Returns every name in every wording, wording by wording."""
    return [template.format(name) for template in TEMPLATES for name in names]


def name_of(prompt: str, names: Sequence[str]) -> int:
    """Returns the index of the name that a prompt ends with: the longest that fits.

    Raises:
        DataError: It ends with none of the names.
    """
    fitting = [k for k, name in enumerate(names) if f" {prompt.lower()}".endswith(f" {name}")]
    if not fitting:
        raise DataError(f"the prompt ends with none of the {len(names)} emoji names: {prompt!r}")
    return max(fitting, key=lambda k: len(names[k]))


@torch.no_grad()
def encode(tokenizer: CLIPTokenizer, encoder: CLIPTextModel, prompts: Sequence[str]) -> Tensor:
    """Returns `(N, L, D)` states, as SD1.5 reads them."""
    return encoder(tokenize(tokenizer, prompts)).last_hidden_state
