"""Reward functions for tests, as a user would write them."""


def letters(completions):
    """The share of bytes that are lower-case letters, which random networks write now and then."""
    return [sum(letter.islower() for letter in text) / max(len(text), 1) for text in completions]


class Failing:
    """Fails at its call number `at`, from 1; 0: never."""

    at = calls = 0
    value = None

    def __call__(self, completions):
        self.calls += 1
        if self.calls >= self.at > 0:
            if self.value is None:
                raise RuntimeError('no judge')
            return [self.value] * len(completions)
        return letters(completions)


failing = Failing()
