//! The OpenAPI document, made of the handlers' annotations and the API's types; what holds for every route is added here.

use std::sync::OnceLock;

use supercloud_api::Problem;
use utoipa::{
    OpenApi as _,
    openapi::{
        Content, OpenApi, Ref, RefOr, Required, Response,
        path::{Operation, Parameter, ParameterBuilder, ParameterIn},
        schema::{ObjectBuilder, Schema, Type},
        security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme},
    },
};

use super::{
    blocks, clouds, events, groups, guest_console, guest_create, guest_evacuation, guest_mirrors, guest_operations,
    guest_placement, guests, histories, hosts, images, join, ledger, links, networks, operations, plans,
};
use super::{
    evacuations, projects, reliability, rentings, session, simulations, stores, system, tokens, verdicts, volumes,
};
use crate::auth::{Access, ROUTES, Route};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Supercloud",
        description = "One layer of cloud over every cloud: guests that move live, with their disks, addresses and connections. \
            Money is integer nano-dollars; times are milliseconds since the Unix epoch; names work wherever ids do.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(Problem)),
    paths(
        system::healthz,
        system::readyz,
        system::metrics,
        system::openapi_document,
        tokens::whoami,
        session::create,
        session::remove,
        tokens::list,
        tokens::create,
        tokens::remove,
        clouds::list,
        clouds::create,
        clouds::read,
        rentings::rent,
        rentings::list,
        rentings::read,
        rentings::give_back,
        rentings::new_join_token,
        stores::list,
        stores::sweep,
        hosts::list,
        hosts::read,
        hosts::change,
        hosts::remove,
        links::list,
        join::create_token,
        join::join,
        projects::list,
        projects::create,
        projects::read,
        images::list,
        images::create,
        images::read,
        images::sites,
        images::remove,
        images::upload,
        images::uploaded,
        images::import,
        blocks::of_image,
        volumes::list,
        volumes::read,
        volumes::volume_sites,
        volumes::check,
        histories::read,
        histories::set,
        histories::remove,
        histories::as_of,
        histories::take,
        histories::checkpoint,
        blocks::of_volume,
        volumes::list_freezes,
        volumes::read_freeze,
        groups::list,
        groups::create,
        groups::read,
        groups::change,
        groups::remove,
        groups::migrate,
        groups::freeze,
        groups::thaw,
        networks::list,
        networks::create,
        networks::read,
        networks::remove,
        networks::list_ports,
        networks::read_port,
        links::flows,
        guests::list,
        guests::read,
        guests::change,
        guest_create::create,
        guest_placement::read,
        guest_console::open,
        guest_console::input,
        guest_evacuation::read,
        guest_operations::start,
        guest_operations::stop,
        guest_operations::migrate,
        guest_mirrors::begin,
        guest_mirrors::list,
        guest_mirrors::end,
        guest_mirrors::fail_over,
        guest_operations::freeze,
        guest_operations::thaw,
        guest_operations::remove,
        operations::list,
        operations::read,
        operations::cancel,
        evacuations::list,
        reliability::read,
        verdicts::list,
        verdicts::tell,
        simulations::create,
        plans::list,
        plans::create,
        plans::read,
        plans::apply,
        plans::cancel,
        plans::undo,
        events::list,
        events::stream,
        ledger::read,
        system::markets,
        system::prices,
        system::set_feed_clock,
    )
)]
struct Document;

fn parameter(name: &str, at: ParameterIn, is_required: bool, kind: Type, text: &str) -> Parameter {
    let schema = Schema::Object(ObjectBuilder::new().schema_type(kind).build());
    ParameterBuilder::new()
        .name(name)
        .parameter_in(at)
        .required(if is_required { Required::True } else { Required::False })
        .description(Some(text))
        .schema(Some(RefOr::T(schema)))
        .build()
}

/// Parameters that follow from the route alone.
fn parameters(route: &Route, lists: bool) -> Vec<Parameter> {
    use ParameterIn::{Header, Path, Query};
    let mut all = Vec::new();
    for name in route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
        all.push(parameter(name, Path, true, Type::String, "Its id, or its name where it has one."));
    }
    let changes = route.method != axum::http::Method::GET;
    if lists {
        all.push(parameter("limit", Query, false, Type::Integer, "Items of the page, 1 to 1000; 100 when absent."));
        all.push(parameter("page", Query, false, Type::String, "`next_page` of the page before."));
    }
    if route.access != Access::Open && route.path.starts_with("/v1/") {
        let text = "The project at hand, for tokens that are good for all.";
        all.push(parameter("project", Query, false, Type::String, text));
    }
    if changes && route.access != Access::Open && route.method != axum::http::Method::PUT {
        let text = "The same key gives the same answer for 24 hours, and changes nothing twice.";
        all.push(parameter("Idempotency-Key", Header, false, Type::String, text));
    }
    if route.is_triable() {
        all.push(parameter("dry_run", Query, false, Type::Boolean, "Only tell what would happen."));
    }
    if (route.path == "/v1/hosts/{host}" && route.method == axum::http::Method::DELETE)
        || route.path.ends_with("/return")
    {
        all.push(parameter("force", Query, false, Type::Boolean, "Give up what only this host has."));
    }
    if route.method == axum::http::Method::PATCH {
        all.push(parameter("If-Match", Header, false, Type::String, "The `ETag` that was read."));
    }
    match route.path {
        "/v1/operations/{operation}" => {
            all.push(parameter(
                "wait",
                Query,
                false,
                Type::String,
                "How long to wait for its end: `30s`, at most 50 s.",
            ));
        }
        "/v1/guests/{guest}/placement" => {
            all.push(parameter("explain", Query, false, Type::Boolean, "Also say what every host says to it."));
            all.push(parameter("place", Query, false, Type::String, "Only this host or cloud."));
        }
        "/v1/reliability" => {
            all.push(parameter(
                "from_ms",
                Query,
                false,
                Type::Integer,
                "From when; 30 days before the end when absent.",
            ));
            all.push(parameter("to_ms", Query, false, Type::Integer, "Until when; now when absent."));
            let text = "Only this guest; one that was deleted, by its id.";
            all.push(parameter("guest", Query, false, Type::String, text));
        }
        "/v1/ledger" => {
            all.push(parameter("limit", Query, false, Type::Integer, "Lines of the page, 1 to 1000; 100 when absent."));
            all.push(parameter("page", Query, false, Type::String, "`next_page` of the page before."));
            all.push(parameter(
                "from_ms",
                Query,
                false,
                Type::Integer,
                "From when; 31 days before the end when absent.",
            ));
            all.push(parameter("to_ms", Query, false, Type::Integer, "Until when; now when absent."));
            all.push(parameter("project", Query, false, Type::String, "Only the guests of this project."));
            all.push(parameter(
                "guest",
                Query,
                false,
                Type::String,
                "Only this guest; one that was deleted, by its id.",
            ));
            all.push(parameter("host", Query, false, Type::String, "Only this host; one that was removed, by its id."));
            all.push(parameter("cloud", Query, false, Type::String, "Only hosts in this cloud."));
            let text =
                "`wall` or `feed`, where the ledger was kept by another clock before: then with from_ms and to_ms.";
            all.push(parameter("clock", Query, false, Type::String, text));
        }
        "/v1/links" => {
            all.push(parameter("host", Query, false, Type::String, "Only those from and to this host."));
        }
        "/v1/events" | "/v1/events/stream" => {
            all.push(parameter("after", Query, false, Type::Integer, "Only events after this number."));
            all.push(parameter("last", Query, false, Type::Integer, "The newest so many events, and what follows."));
        }
        "/v1/images/{image}/parts/{part}" => {
            if route.method == axum::http::Method::GET {
                all.push(parameter("offset", Query, false, Type::Integer, "Where the stretch begins; 0 when absent."));
                all.push(parameter(
                    "bytes",
                    Query,
                    false,
                    Type::Integer,
                    "Its length, at most 1 GiB; that when absent.",
                ));
            } else {
                let text = "Where the piece goes: how much is kept so far.";
                all.push(parameter("offset", Query, true, Type::Integer, text));
            }
        }
        path if path.ends_with("/blocks") => {
            all.push(parameter("from_block", Query, false, Type::Integer, "The first block; 0 when absent."));
            all.push(parameter(
                "to_block",
                Query,
                false,
                Type::Integer,
                "The first block not any more; the end when absent.",
            ));
            let text = "Give the digests of the blocks instead, to check what was received before.";
            all.push(parameter("digests", Query, false, Type::Boolean, text));
        }
        _ => {}
    }
    if route.path == "/v1/events/stream" {
        all.push(parameter("Last-Event-ID", Header, false, Type::String, "Only events after this number."));
    }
    all
}

fn answers_pages(operation: &Operation) -> bool {
    operation.responses.responses.get("200").is_some_and(|response| match response {
        RefOr::T(response) => response.content.values().any(|content| match &content.schema {
            Some(RefOr::Ref(reference)) => reference.ref_location.contains("/Page_"),
            _ => false,
        }),
        RefOr::Ref(_) => false,
    })
}

fn complete(operation: &mut Operation, route: &Route) {
    let parameters = parameters(route, answers_pages(operation));
    operation.parameters.get_or_insert_default().extend(parameters);
    let mut problem = Response::new("A problem (RFC 9457)");
    problem.content.insert(
        "application/problem+json".to_owned(),
        Content::new(Some(RefOr::Ref(Ref::from_schema_name("Problem")))),
    );
    operation.responses.responses.insert("default".to_owned(), RefOr::T(problem));
    operation.operation_id = Some(operation_id(route));
    if route.access != Access::Open {
        let none: [&str; 0] = [];
        operation.security = Some(vec![SecurityRequirement::new("token", none)]);
    }
}

/// A name for generated clients, unique: what the path names, then what is done (`guests_migrate`, `guests_list`).
fn operation_id(route: &Route) -> String {
    let parts: Vec<&str> = route.path.split('/').filter(|part| !part.is_empty() && *part != "v1").collect();
    let nouns: Vec<String> =
        parts.iter().filter(|part| !part.starts_with('{')).map(|part| part.replace(['-', '.'], "_")).collect();
    let is_one = parts.last().is_some_and(|part| part.starts_with('{'));
    let verb = match (route.method.as_str(), is_one) {
        ("GET", false) => "list",
        ("GET", true) => "read",
        ("POST", _) => "create",
        ("PUT", _) => "put",
        ("PATCH", _) => "change",
        _ => "remove",
    };
    // A path whose last word says itself what is done or read; things of a thing are listed and made like others.
    let is_shared = ROUTES.iter().filter(|other| other.path == route.path).count() > 1;
    let is_verb = !is_one && parts.len() > 1 && parts[parts.len() - 2].starts_with('{') && !is_shared;
    let is_thing = parts.len() == 1 && !parts[0].ends_with('s');
    match is_verb || (is_thing && route.method == axum::http::Method::GET) {
        true => nouns.join("_"),
        false => format!("{}_{verb}", nouns.join("_")),
    }
}

/// The document.
#[must_use]
pub fn document() -> OpenApi {
    let mut document = Document::openapi();
    for (path, item) in &mut document.paths.paths {
        for route in ROUTES.iter().filter(|route| route.path == path) {
            let operation = match route.method.as_str() {
                "GET" => item.get.as_mut(),
                "POST" => item.post.as_mut(),
                "PUT" => item.put.as_mut(),
                "PATCH" => item.patch.as_mut(),
                "DELETE" => item.delete.as_mut(),
                _ => None,
            };
            if let Some(operation) = operation {
                complete(operation, route);
            }
        }
    }
    let scheme = SecurityScheme::Http(Http::builder().scheme(HttpAuthScheme::Bearer).build());
    document.components.get_or_insert_default().add_security_scheme("token", scheme);
    document
}

/// The document as text: pretty, with a newline at its end.
pub fn document_text() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| {
        let mut text = document().to_pretty_json().unwrap_or_default();
        text.push('\n');
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Set `BLESS=1` to write the checked-in document.
    #[test]
    fn the_checked_in_document_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/openapi.json");
        if std::env::var_os("BLESS").is_some() {
            std::fs::write(path, document_text()).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(kept == document_text(), "api/openapi.json is not what the code says: run this test with BLESS=1");
    }

    #[test]
    fn the_document_has_the_routes_of_the_role_table_and_no_others() {
        let document = document();
        let mut described: Vec<(String, String)> = Vec::new();
        for (path, item) in &document.paths.paths {
            let verbs = [
                ("GET", &item.get),
                ("POST", &item.post),
                ("PUT", &item.put),
                ("PATCH", &item.patch),
                ("DELETE", &item.delete),
            ];
            for (verb, operation) in verbs {
                if operation.is_some() {
                    described.push((verb.to_owned(), path.clone()));
                }
            }
        }
        let mut listed: Vec<(String, String)> =
            ROUTES.iter().map(|route| (route.method.to_string(), route.path.to_owned())).collect();
        let ids: std::collections::BTreeSet<String> = ROUTES.iter().map(operation_id).collect();
        assert_eq!(ids.len(), ROUTES.len(), "operation ids are unique: {ids:?}");
        described.sort();
        listed.sort();
        assert_eq!(described, listed);
    }
}
