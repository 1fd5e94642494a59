"""The ground floor: noise schedules, denoisers and the prior that ships."""
