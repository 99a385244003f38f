//! Pages of a listing.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One page of a listing. `next_page`, when present, is passed back as `?page=`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// The items of this page, ordered by id.
    pub items: Vec<T>,
    /// Where the next page starts; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_page: Option<String>,
}
