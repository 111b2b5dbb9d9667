"""Stubs of KEDA's external scaler, generated from ``proto/externalscaler`` by ``make proto``."""
