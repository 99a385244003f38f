//! The dashboard: built files that are part of the program (`controller/dashboard` has their sources and says how they are made).
//!
//! They hold nothing secret and are served to everybody; what they show they ask of REST `/v1`, as whoever signs in there.

use axum::{
    Router,
    extract::Path,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use rust_embed::{EmbeddedFile, RustEmbed};

#[derive(RustEmbed)]
#[folder = "dashboard/dist"]
struct Files;

/// Nothing but our own files, no inline script, no frame around us.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The routes of the dashboard: `/` and its files.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", get(async |headers: HeaderMap| serve("index.html", &headers)))
        .route("/favicon.svg", get(async |headers: HeaderMap| serve("favicon.svg", &headers)))
        .route("/assets/{file}", get(asset))
}

async fn asset(Path(file): Path<String>, headers: HeaderMap) -> Response {
    serve(&format!("assets/{file}"), &headers)
}

fn kind(path: &str) -> &'static str {
    match path.rsplit_once('.').map(|(_, ending)| ending) {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    }
}

fn serve(path: &str, headers: &HeaderMap) -> Response {
    // The embedded set is closed: a name that is not in it is nowhere, whatever it looks like.
    let Some(file) = Files::get(path) else { return StatusCode::NOT_FOUND.into_response() };
    let tag = format!("\"{}\"", hex::encode(&file.metadata.sha256_hash()[..16]));
    let mut response = if headers.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        StatusCode::NOT_MODIFIED.into_response()
    } else {
        content(file, path)
    };
    let out = response.headers_mut();
    // The names of assets change with their content.
    let keep = if path.starts_with("assets/") { "public, max-age=31536000, immutable" } else { "no-cache" };
    let fixed: [(HeaderName, &'static str); 5] = [
        (header::CACHE_CONTROL, keep),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ];
    for (name, value) in fixed {
        out.insert(name, HeaderValue::from_static(value));
    }
    if let Ok(tag) = HeaderValue::try_from(tag) {
        out.insert(header::ETAG, tag);
    }
    response
}

fn content(file: EmbeddedFile, path: &str) -> Response {
    ([(header::CONTENT_TYPE, kind(path))], file.data).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_and_all_that_it_names_are_part_of_the_program() {
        let page = String::from_utf8(Files::get("index.html").unwrap().data.into_owned()).unwrap();
        let named: Vec<&str> = page
            .split('"')
            .filter_map(|text| text.strip_prefix("./").or_else(|| text.strip_prefix('/')))
            .filter(|text| text.contains('.'))
            .collect();
        assert!(named.len() >= 2, "{page}");
        for name in named {
            let response = serve(name, &HeaderMap::new());
            assert_eq!(response.status(), StatusCode::OK, "{name}");
            assert!(!response.headers()[header::CONTENT_TYPE].to_str().unwrap().contains("octet"), "{name}");
        }
        // Nothing is fetched from elsewhere, and the policy would not run an inline script.
        assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script>"), "{page}");
    }

    #[test]
    fn names_that_are_not_ours_are_nowhere_and_known_content_is_not_sent_again() {
        for path in ["assets/../../Cargo.toml", "assets/", "nothing", "assets/index.html"] {
            assert_eq!(serve(path, &HeaderMap::new()).status(), StatusCode::NOT_FOUND, "{path}");
        }
        let first = serve("index.html", &HeaderMap::new());
        let mut headers = HeaderMap::new();
        headers.insert(header::IF_NONE_MATCH, first.headers()[header::ETAG].clone());
        assert_eq!(serve("index.html", &headers).status(), StatusCode::NOT_MODIFIED);
        let policy = first.headers()[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.contains("default-src 'none'") && !policy.contains("unsafe"));
    }
}
