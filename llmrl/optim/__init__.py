"""Modules that learn, each with its optimizer: settings, schedule, and one trainable for each kind of launch."""
