"""Prints the README's table of the fields that the HTTP endpoints take, from the program's own."""

from runner.openai.descriptions import DESCRIPTIONS
from runner.openai.fields import CHAT, COMPLETIONS, DETOKENIZE, EMBEDDINGS, TOKENIZE, Endpoint

COLUMNS = {"completions": COMPLETIONS.online, "chat": CHAT.online}
COLUMNS |= {"embeddings": EMBEDDINGS, "tokenize": TOKENIZE, "detokenize": DETOKENIZE}


def table() -> str:
    """A row for each field that has an effect."""
    rows = ["| field | of | what it does |", "|---|---|---|"]
    for name, what in DESCRIPTIONS.items():
        takers = [column for column, endpoint in COLUMNS.items() if name in endpoint.fields]
        of = "all" if len(takers) == len(COLUMNS) else ", ".join(takers)
        rows.append(f"| `{name}` | {of} | {what} |")
    return "\n".join(rows)


def neutral() -> str:
    """The fields that are taken only where they ask for nothing."""
    endpoints: list[Endpoint] = list(COLUMNS.values())
    names = sorted({name for it in endpoints for name in it.neutral})
    described = [name for name in names if name in DESCRIPTIONS]
    return ", ".join(f"`{name}`" for name in names if name not in described)


if __name__ == "__main__":
    print(table())
    print()
    print(neutral())
