//! What the substrate really is, by measuring.
