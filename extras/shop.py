"""A web shop: WebShop's task, actions and reward, with a generated catalogue and BM25 search."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from env import Env, check_integers


# department -> categories; a shop sells every category in variants that differ in attributes, options and price
DEPARTMENTS = {"clothing": ("shirt", "jacket", "dress", "socks"), "kitchen": ("mug", "pan", "kettle", "knife"),
               "furniture": ("chair", "table", "lamp", "shelf"),
               "electronics": ("headphones", "speaker", "charger", "camera")}
ATTRIBUTES = {"clothing": ("cotton", "warm", "washable", "light", "striped", "stretchy"),
              "kitchen": ("steel", "ceramic", "insulated", "foldable", "enamel", "heavy"),
              "furniture": ("wooden", "metal", "compact", "padded", "modern", "rustic"),
              "electronics": ("wireless", "portable", "waterproof", "silent", "solar", "slim")}
OPTIONS = {"color": ("red", "blue", "green", "black", "white"), "size": ("small", "medium", "large")}


@dataclass(frozen=True)
class Product:
    name: str  # what is clicked on
    department: str
    category: str
    attributes: tuple[str, ...]
    options: dict[str, tuple[str, ...]]  # option -> the values that are on sale
    price: int  # dollars

    def __deepcopy__(self, memo):  # never changed: copies of a shop share the catalogue
        return self

    @property
    def title(self):
        return " ".join((*self.attributes, self.category))


@lru_cache(maxsize=8)
def catalogue(seed, size):
    """`size` products, the same for the same seed."""
    rng = np.random.default_rng(seed)
    pick = lambda values, n: tuple(str(value) for value in rng.choice(values, size=n, replace=False))
    products = []
    for i in range(size):
        department = str(rng.choice(list(DEPARTMENTS)))
        options = {name: tuple(sorted(pick(values, int(rng.integers(2, len(values) + 1))), key=values.index))
                   for name, values in OPTIONS.items()}
        products.append(Product(f"b{i + 1}", department, str(rng.choice(DEPARTMENTS[department])),
                                pick(ATTRIBUTES[department], 3), options, int(rng.integers(5, 100))))
    return tuple(products)


@lru_cache(maxsize=8)
def _word_counts(seed, size):
    texts = (f"{p.title} {p.category} {p.department}" for p in catalogue(seed, size))
    documents = [Counter(re.findall(r"[a-z0-9]+", text)) for text in texts]
    return documents, Counter(word for document in documents for word in document)


@lru_cache(maxsize=4096)
def search(seed, size, query, k1=1.5, b=0.75):
    """The products that share a word with the query, best first, by Okapi BM25 (ties in catalogue order)."""
    documents, containing = _word_counts(seed, size)
    mean = sum(document.total() for document in documents) / size
    scores = [0.0] * size
    for word in query.split():
        rarity = math.log(1 + (size - containing[word] + 0.5) / (containing[word] + 0.5))
        for i, document in enumerate(documents):
            if count := document[word]:
                scores[i] += rarity * count * (k1 + 1) / (count + k1 * (1 - b + b * document.total() / mean))
    return tuple(sorted((i for i in range(size) if scores[i]), key=lambda i: -scores[i]))


class Shop(Env):
    """Find the product that an instruction describes, choose its options, buy it: WebShop's task, another catalogue.

    The reward comes with the purchase: score = type * (attributes + options + price) / (wanted attributes + wanted
    options + 1), where the first three count what was asked for and is there, price is 1 if it is within the limit, and
    type is 1 for the wanted category, 0.5 for another of its department, 0 otherwise. Success is a score of 1.
    products: size of the catalogue; page: results on a page; catalogue_seed: which catalogue. Instructions are drawn
    such that their own words find a right product within the budget.
    """

    actions = ("search[words]", "click[thing]")
    intro = ("You are shopping: find a product that fits the instruction, choose its options and buy it.\n"
             "Search for words, click on what is listed in square brackets. The purchase ends the game.")
    fact_pattern = re.compile(r"B\d+ (?:fits|is too expensive|lacks [a-z]+|is no [a-z]+)\.|You want [a-z]+\.")

    def __init__(self, *, products=300, page=5, catalogue_seed=0, max_turns=9, actions_per_turn=1, max_actions=9,
                 **budgets):
        super().__init__(max_turns=max_turns, actions_per_turn=actions_per_turn, max_actions=max_actions, **budgets)
        check_integers(1, products=products, page=page)
        check_integers(0, catalogue_seed=catalogue_seed)
        if actions_per_turn != 1:
            raise ValueError("actions_per_turn must be 1: what can be clicked depends on the click before")
        if min(self.max_turns, self.max_actions) < 3 + len(OPTIONS):
            raise ValueError(f"max_turns and max_actions must be at least {3 + len(OPTIONS)}: search, product, "
                             f"{len(OPTIONS)} options, buy now")
        self.products, self.page, self.catalogue_seed = catalogue(catalogue_seed, products), page, catalogue_seed

    def instance(self):
        for _ in range(10_000):
            self.target = self.products[self.rng.integers(len(self.products))]
            self.wanted = tuple(str(word) for word in self.rng.choice(self.target.attributes, size=2, replace=False))
            self.wanted_options = {name: str(self.rng.choice(values)) for name, values in self.target.options.items()}
            self.limit = self.target.price + int(self.rng.integers(1, 20))
            self.results, self.first, self.product, self.chosen, self.bought = None, 0, None, {}, None
            plan = self.oracle()
            if plan is not None and len(plan) <= self.actions_left:
                return
        raise RuntimeError("found no instruction that can be fulfilled within the budget in 10000 draws")

    # The pages: search (results None), results (product None), product ---------------------------------------------

    def clicks(self):
        """What can be clicked on this page."""
        if self.product is not None:
            values = [value for values in self.product.options.values() for value in values]
            return [*values, "buy now", "back to results", "back to search"]
        if self.results is None:
            return []
        turning = ["next page"] * (self.first + self.page < len(self.results)) + ["previous page"] * (self.first > 0)
        return [*(self.products[i].name for i in self._shown()), *turning, "back to search"]

    def _shown(self):
        return self.results[self.first:self.first + self.page]

    def read(self, text):
        match = re.fullmatch(r"\s*(search|click)\s*\[([^\[\]]*)\]\s*", text, re.IGNORECASE | re.ASCII)
        if match is None:
            return None
        if match[1].lower() == "search":
            words = re.findall(r"[a-z0-9]+", match[2].lower())
            return f"search[{' '.join(words[:20])}]" if words and self.results is None else None
        thing = " ".join(match[2].split()).lower()
        return f"click[{thing}]" if thing in self.clicks() else None

    def random_action(self, rng):
        if self.results is None:
            return f"search[{rng.choice([category for group in DEPARTMENTS.values() for category in group])}]"
        return f"click[{rng.choice(self.clicks())}]"

    def move(self, action):
        verb, thing = action[:-1].split("[", 1)
        if verb == "search":
            self.results, self.first = search(self.catalogue_seed, len(self.products), thing), 0
        elif thing == "back to search":
            self.results, self.product = None, None
        elif thing == "back to results":
            self.product = None
        elif thing in ("next page", "previous page"):
            self.first += self.page if thing == "next page" else -self.page
        elif thing == "buy now":
            self.bought = self.product
            return self.score(self.product, self.chosen)
        elif self.product is None:
            shown = [self.products[i] for i in self._shown()]
            self.product, self.chosen = next(product for product in shown if product.name == thing), {}
        else:
            self.chosen = self.chosen | {name: thing for name, values in self.product.options.items()
                                         if thing in values}
        return 0.0

    def score(self, product, chosen):
        """WebShop's reward for buying a product with chosen options {name: value}."""
        same_department = product.department == self.target.department
        kind = 1.0 if product.category == self.target.category else 0.5 if same_department else 0.0
        found = len(set(self.wanted) & set(product.attributes)) + (product.price <= self.limit)
        found += sum(chosen.get(name) == value for name, value in self.wanted_options.items())
        return kind * found / (len(self.wanted) + len(self.wanted_options) + 1)

    def _perfect(self, product):
        """Whether a product can be bought for a score of 1."""
        offered = all(value in product.options[name] for name, value in self.wanted_options.items())
        return offered and self.score(product, self.wanted_options) == 1

    def solved(self):
        return self.bought is not None and self.score(self.bought, self.chosen) == 1

    def failed(self):
        return self.bought is not None and not self.solved()

    def outcome(self):
        bought = self.bought is not None
        return {"purchased": float(bought), "score": self.score(self.bought, self.chosen) if bought else 0.0}

    @property
    def query(self):
        """What the instruction asks for, in its own words."""
        return " ".join((*self.wanted, self.target.category))

    def oracle(self):
        """The shortest way to a score of 1 that searches for nothing but the instruction's own words, or None."""
        if self.bought is not None:
            return [] if self.solved() else None
        choose = lambda chosen: [f"click[{v}]" for name, v in self.wanted_options.items() if chosen.get(name) != v]
        if self.product is not None and self._perfect(self.product):
            return [*choose(self.chosen), "click[buy now]"]
        plans = []
        anew = search(self.catalogue_seed, len(self.products), self.query)
        back = ["click[back to search]"] * (self.results is not None)
        here = ["click[back to results]"] * (self.product is not None)
        for results, first, way in ((self.results, self.first, here), (anew, 0, [*back, f"search[{self.query}]"])):
            for rank, i in enumerate(results or ()):
                if self._perfect(self.products[i]):
                    pages = rank // self.page - first // self.page
                    turning = ["click[next page]" if pages > 0 else "click[previous page]"] * abs(pages)
                    plans.append([*way, *turning, f"click[{self.products[i].name}]", *choose({}), "click[buy now]"])
        return min(plans, key=len, default=None)

    def gold(self):
        """The purchase: the target, its options, buy now."""
        return " || ".join(f"click[{thing}]" for thing in (self.target.name, *self.wanted_options.values(), "buy now"))

    # What the agent reads ------------------------------------------------------------------------------------------

    @property
    def phrases(self):
        """Strings that the built-in agent's tokenizer makes one token of each."""
        values = [value for values in OPTIONS.values() for value in values]
        clicks = [*values, "buy now", "back to results", "back to search", "next page", "previous page"]
        return ["Legal actions: ", *(f"click[{thing}]" for thing in clicks)]

    action_help = "search[words] on the search page, click[thing] on any other"

    def render(self):
        options = " and ".join(f"{name} {value}" for name, value in self.wanted_options.items())
        lines = [f"Instruction: buy a {self.query} with {options} for at most {self.limit} dollars."]
        if self.bought is not None:
            lines.append(f"You bought {self.bought.name}.")
        elif self.product is not None:
            lines += [f"{self.product.name}: {self.product.title}, {self.product.price} dollars"]
            lines += [f"{name}: {' '.join(f'[{v}]' for v in values)}, chosen: {self.chosen.get(name, 'none')}"
                      for name, values in self.product.options.items()]
        elif self.results is not None:
            lines.append(f"{len(self.results)} results, page {self.first // self.page + 1}")
            lines += [f"[{p.name}] {p.title}, {p.price} dollars" for p in (self.products[i] for i in self._shown())]
        things = self.clicks()
        legal = "search[words]" if self.results is None else " ".join(f"click[{thing}]" for thing in things)
        return "\n".join([*lines, f"Legal actions: {'none' if self.bought is not None else legal}"])

    def facts(self):
        """"Fits" is said of what the page of results shows: a product's options stand on its own page."""
        if self.product is not None or self.results is None:
            chosen = self.chosen if self.product is not None else {}
            return [f"You want {value}." for name, value in self.wanted_options.items() if chosen.get(name) != value]
        sentences = []
        for item in (self.products[i] for i in self._shown()):
            lacking = [word for word in self.wanted if word not in item.attributes]
            if item.category != self.target.category:
                what = f"is no {self.target.category}"
            elif lacking:
                what = f"lacks {lacking[0]}"
            else:
                what = "is too expensive" if item.price > self.limit else "fits"
            sentences.append(f"{item.name.capitalize()} {what}.")
        return sentences
