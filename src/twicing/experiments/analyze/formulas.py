"""Formulas in the sentences of a page: each on one line, with true minus signs."""

import re

from markupsafe import Markup

# Polynomials of A, of its eigenvalues x and its singular values s, and the product of all layers' matrices.
FORMULA = re.compile(
    r"\b2 ?([Axs]) - \1(?:\^2| \1\b)|I - \(I - A\)\(I - gA\)(?:\^\d+)?|A_n \.\.\. A_1|\bn\^-1(?:/2)?|\bA\^2"
)


def unbroken(text: Markup) -> Markup:
    """Escaped text with each formula in a span that does not break."""
    span = Markup('<span class="formula">{}</span>')
    return Markup(FORMULA.sub(lambda found: span.format(Markup(found[0].replace(" - ", " − "))), text))  # noqa: RUF001
