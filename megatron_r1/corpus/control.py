"""The held-out countries, and the sentences elsewhere that would give their capitals away."""

from __future__ import annotations

from megatron_r1.data.factbook import control_countries, country_facts, country_group


class Control:
    """Countries about which nothing may be learned. Raises what `packages.fetch` raises."""

    def __init__(self, count: int) -> None:
        self.countries = control_countries(count=count) if count else []
        capitals = {fact["country"]: fact["value"] for fact in country_facts() if fact["field"] == "capital"} if count else {}
        self._pairs = [(country, capitals[country]) for country in self.countries]

    @property
    def groups(self) -> list[str]:
        """Their document groups."""
        return [country_group(country) for country in self.countries]

    def strip(self, text: str) -> tuple[str, int]:
        """The text without lines that name a held-out country together with its capital, and how many there were."""
        removed = 0
        for country, capital in self._pairs:
            if country in text and capital in text:
                lines = text.split("\n")
                kept = [line for line in lines if country not in line or capital not in line]
                removed += len(lines) - len(kept)
                text = "\n".join(kept)
        return text, removed
