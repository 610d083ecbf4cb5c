//! Whole timelines in simulated time, over simulated disks and a simulated network.
