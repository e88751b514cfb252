"""What is concluded from a run: functions of its record, or of tensors of draws."""
