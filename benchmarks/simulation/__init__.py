"""The engine's scheduler without models: acceptances drawn or recorded, costs on paper, requests by the thousand."""
