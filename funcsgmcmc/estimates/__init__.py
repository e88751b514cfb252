"""Estimates: functions of a run's record, or of tensors of draws."""
