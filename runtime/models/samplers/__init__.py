"""How noise is taken out: samplers and schedules by the names people know, the levels of a schedule, and the
samplers that diffusers does not have."""
