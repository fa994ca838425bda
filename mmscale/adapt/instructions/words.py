"""As much English as phrasings need: articles, plurals, numbers in words."""

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def with_article(noun: str) -> str:
    """`ring` -> `a ring`, `orange ring` -> `an orange ring`; by the letter, not the sound."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


def plural(noun: str) -> str:
    """Regular plurals: `star` -> `stars`, `cross` -> `crosses`, `berry` -> `berries`."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def number_word(number: int) -> str:
    """`zero` to `twelve`; digits beyond."""
    return NUMBERS[number] if number < len(NUMBERS) else str(number)
