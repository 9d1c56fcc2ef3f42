"""Launch, device, collectives, roles split over ranks, and the heartbeat."""
