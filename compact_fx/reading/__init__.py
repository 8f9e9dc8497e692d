"""For people: reports, explanations, graphs, pictures."""
