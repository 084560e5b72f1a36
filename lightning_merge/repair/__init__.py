"""Repair of merged models: what data say about activations, and corrections of them (REPAIR, TACT)."""
