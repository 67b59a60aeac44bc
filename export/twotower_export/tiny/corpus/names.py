"""Names of those whom the corpus tells of."""

NAMES = (
    "Mia", "Tom", "Anna", "Ben", "Clara", "Otto", "Lena", "Paul", "Rosa", "Hugo", "Ida", "Max",
    "Nora", "Felix", "Emma", "Leo", "Vera", "Oscar", "Lucy", "Bruno", "Alma", "Theo", "Greta",
    "Kurt",
)  # fmt: skip
