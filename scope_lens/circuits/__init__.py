"""Feature circuits: attribution graphs, interventions, verification, export."""
