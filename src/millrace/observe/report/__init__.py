"""From kept samples to phases, figures, the wall in words, and a page. It samples nothing."""
