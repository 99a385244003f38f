//! The driver.

use std::{collections::BTreeMap, time::Duration};

use aws_config::{BehaviorVersion, Region, retry::RetryConfig, timeout::TimeoutConfig};
use aws_sdk_ec2::{
    Client,
    config::http::HttpRequest,
    primitives::DateTime,
    types::{
        Filter, HttpTokensState, IamInstanceProfileSpecification, InstanceInterruptionBehavior,
        InstanceMarketOptionsRequest, InstanceMetadataOptionsRequest, InstanceType as TypeName, MarketType, Placement,
        ResourceType, ShutdownBehavior, SpotInstanceType, SpotMarketOptions, Tag, TagSpecification,
    },
};
use aws_smithy_http_client::{Builder, tls};
use base64::Engine as _;
use supercloud_api::Tenure;
use supercloud_provider::{
    Abilities, Call, Instance, InstanceType, LaunchOrder, Nesting, Notice, NoticeKind, PriceQuery, Provider,
    ProviderError, Series,
};
use supercloud_scheduler::money::NanoUsd;
use tokio::sync::OnceCell;

use crate::{
    Settings,
    convert::{self, OWNER_TAG, TOKEN_TAG},
    translate,
};

/// One attempt of one call.
const ATTEMPT_BUDGET: Duration = Duration::from_secs(20);
const CONNECT_BUDGET: Duration = Duration::from_secs(5);
/// Attempts of a call that is throttled or fails in passing; pauses double from `FIRST_PAUSE`, with jitter.
const ATTEMPTS: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Entries of a price history that are kept: 90 days of some thousand markets.
const PRICES_AT_MOST: usize = 5_000_000;
/// Machines of one controller.
const INSTANCES_AT_MOST: usize = 100_000;

/// A region of EC2, or a zone of it.
#[derive(Debug)]
pub struct Ec2 {
    settings: Settings,
    on_demand: BTreeMap<String, NanoUsd>,
    egress: BTreeMap<String, NanoUsd>,
    /// Made at the first call: credentials may have to be fetched.
    client: OnceCell<Client>,
}

fn tag(key: &str, value: &str) -> Tag {
    Tag::builder().key(key).value(value).build()
}

fn filter(name: &str, value: &str) -> Filter {
    Filter::builder().name(name).values(value).build()
}

fn time(ms: u64) -> DateTime {
    DateTime::from_millis(i64::try_from(ms).unwrap_or(i64::MAX))
}

/// Asks for nested virtualization in a `RunInstances` that was written without it: this SDK does not know the field yet.
fn with_nesting(request: &mut HttpRequest) {
    let Some(body) = request.body().bytes() else { return };
    let longer = [body, b"&CpuOptions.NestedVirtualization=enabled"].concat();
    let length = longer.len().to_string();
    *request.body_mut() = longer.into();
    request.headers_mut().insert("content-length", length);
}

impl Ec2 {
    /// A driver; asks nobody yet.
    ///
    /// # Errors
    /// A sentence that names the setting that is wrong.
    pub fn new(settings: Settings) -> Result<Self, String> {
        settings.check()?;
        Ok(Self {
            on_demand: Settings::amounts(&settings.on_demand_usd_per_hour, "on_demand_usd_per_hour")?,
            egress: Settings::amounts(&settings.egress_usd_per_gib, "egress_usd_per_gib")?,
            settings,
            client: OnceCell::new(),
        })
    }

    async fn client(&self) -> &Client {
        let make = || async {
            let http = Builder::new().tls_provider(tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring));
            let timeouts = TimeoutConfig::builder()
                .connect_timeout(CONNECT_BUDGET)
                .operation_attempt_timeout(ATTEMPT_BUDGET)
                .build();
            let mut loader = aws_config::defaults(BehaviorVersion::v2026_01_12())
                .region(Region::new(self.settings.region.clone()))
                .http_client(http.build_https())
                .retry_config(RetryConfig::standard().with_max_attempts(ATTEMPTS).with_initial_backoff(FIRST_PAUSE))
                .timeout_config(timeouts);
            if let Some(url) = &self.settings.endpoint_url {
                loader = loader.endpoint_url(url);
            }
            Client::new(&loader.load().await)
        };
        self.client.get_or_init(make).await
    }

    async fn list(&self, filters: Vec<Filter>) -> Result<Vec<Instance>, ProviderError> {
        let mut pages =
            self.client().await.describe_instances().set_filters(Some(filters)).into_paginator().page_size(500).send();
        let mut found = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.map_err(convert::error)?;
            let told = page.reservations().iter().flat_map(|reservation| reservation.instances());
            found.extend(told.filter_map(|one| convert::instance(one, &self.settings.region)));
            if found.len() > INSTANCES_AT_MOST {
                return Err(ProviderError::Failed {
                    what: format!("more than {INSTANCES_AT_MOST} machines were told"),
                });
            }
        }
        Ok(found)
    }

    async fn types(&self, only: Option<&str>) -> Result<Vec<InstanceType>, ProviderError> {
        let client = self.client().await;
        let request = client.describe_instance_types();
        let mut types = Vec::new();
        match only {
            // Page sizes are not taken together with names.
            Some(name) => {
                let told = request.instance_types(TypeName::from(name)).send().await.map_err(convert::error)?;
                types.extend(told.instance_types().iter().filter_map(convert::instance_type));
            }
            None => {
                let mut pages = request.into_paginator().page_size(100).send();
                while let Some(page) = pages.next().await {
                    let page = page.map_err(convert::error)?;
                    types.extend(page.instance_types().iter().filter_map(convert::instance_type));
                }
            }
        }
        types.sort_by(|a, b| a.name.cmp(&b.name));
        types.dedup_by(|a, b| a.name == b.name);
        Ok(types)
    }

    async fn run(&self, order: &LaunchOrder) -> Result<Instance, ProviderError> {
        let types = self.types(Some(&order.instance_type)).await?;
        let Some(known) = types.iter().find(|of| of.name == order.instance_type) else {
            return Err(ProviderError::BadOrder { what: format!("EC2 knows no type '{}'", order.instance_type) });
        };
        // EC2's client token says the same, for a day or so and where the server knows it; a tag is for ever.
        let given = self.list(vec![filter(&format!("tag:{TOKEN_TAG}"), &order.token)]).await?;
        if let Some(instance) = given.into_iter().find(|one| one.state.may_cost()) {
            return Ok(instance);
        }
        let tags = [tag(OWNER_TAG, &order.owner), tag(TOKEN_TAG, &order.token), tag("Name", &order.name)];
        let tagged =
            |what: ResourceType| TagSpecification::builder().resource_type(what).set_tags(Some(tags.to_vec())).build();
        let user_data = base64::engine::general_purpose::STANDARD.encode(&order.user_data);
        let groups = &self.settings.security_group_ids;
        let mut request = self
            .client()
            .await
            .run_instances()
            .client_token(&order.token)
            .image_id(&self.settings.image_id)
            .instance_type(TypeName::from(order.instance_type.as_str()))
            .min_count(1)
            .max_count(1)
            .user_data(user_data)
            // A host that switches itself off costs nothing more.
            .instance_initiated_shutdown_behavior(ShutdownBehavior::Terminate)
            .metadata_options(
                InstanceMetadataOptionsRequest::builder()
                    .http_tokens(HttpTokensState::Required)
                    .http_put_response_hop_limit(1)
                    .build(),
            )
            .tag_specifications(tagged(ResourceType::Instance))
            .tag_specifications(tagged(ResourceType::Volume))
            .set_subnet_id(self.settings.subnet_id.clone())
            .set_security_group_ids((!groups.is_empty()).then(|| groups.clone()))
            .set_key_name(self.settings.key_name.clone())
            .set_iam_instance_profile(
                self.settings
                    .instance_profile
                    .as_ref()
                    .map(|name| IamInstanceProfileSpecification::builder().name(name).build()),
            );
        if let Some(zone) = &self.settings.zone {
            request = request.placement(Placement::builder().availability_zone(zone).build());
        }
        if order.tenure == Tenure::Spot {
            let spot = SpotMarketOptions::builder()
                .spot_instance_type(SpotInstanceType::OneTime)
                .instance_interruption_behavior(InstanceInterruptionBehavior::Terminate)
                .set_max_price(order.max_price.map(translate::price_text))
                .build();
            request = request.instance_market_options(
                InstanceMarketOptionsRequest::builder().market_type(MarketType::Spot).spot_options(spot).build(),
            );
        }
        let sent = if known.nesting == Nesting::OnRequest {
            request.customize().mutate_request(with_nesting).send().await
        } else {
            request.send().await
        };
        let told = sent.map_err(convert::error)?;
        let launched = told.instances().first().and_then(|one| convert::instance(one, &self.settings.region));
        // Of unknown outcome: the listing will tell.
        launched
            .ok_or_else(|| ProviderError::Failed { what: "RunInstances told of no machine with our tags".to_owned() })
    }
}

impl Provider for Ec2 {
    fn abilities(&self) -> Abilities {
        Abilities { launches: true, spot: true }
    }

    fn catalogue(&self) -> Call<'_, Vec<InstanceType>> {
        Box::pin(self.types(None))
    }

    fn spot_prices<'a>(&'a self, query: &'a PriceQuery) -> Call<'a, Vec<Series>> {
        Box::pin(async move {
            let types: Vec<TypeName> = query.instance_types.iter().map(|name| TypeName::from(name.as_str())).collect();
            let mut entries = Vec::new();
            let mut pages = self
                .client()
                .await
                .describe_spot_price_history()
                .start_time(time(query.from_ms))
                .end_time(time(query.to_ms))
                .product_descriptions("Linux/UNIX")
                .set_availability_zone(self.settings.zone.clone())
                .set_instance_types((!types.is_empty()).then_some(types))
                .into_paginator()
                .page_size(1000)
                .send();
            while let Some(page) = pages.next().await {
                for told in page.map_err(convert::error)?.spot_price_history() {
                    let (Some(zone), Some(of), Some(at), Some(text)) =
                        (told.availability_zone(), told.instance_type(), told.timestamp(), told.spot_price())
                    else {
                        continue;
                    };
                    let Some(at_ms) = at.to_millis().ok().and_then(|ms| u64::try_from(ms).ok()) else { continue };
                    entries.push((zone.to_owned(), of.as_str().to_owned(), at_ms, translate::price(text)?));
                }
                if entries.len() > PRICES_AT_MOST {
                    let what = format!("more than {PRICES_AT_MOST} prices: ask for fewer types or less time");
                    return Err(ProviderError::BadOrder { what });
                }
            }
            Ok(translate::series(entries))
        })
    }

    fn on_demand_price<'a>(&'a self, instance_type: &'a str) -> Call<'a, Option<NanoUsd>> {
        let price = self.on_demand.get(instance_type).copied();
        Box::pin(async move { Ok(price) })
    }

    fn egress_price_per_gib(&self, to: &str) -> Option<NanoUsd> {
        self.egress.get(to).or_else(|| self.egress.get("*")).copied()
    }

    fn launch<'a>(&'a self, order: &'a LaunchOrder) -> Call<'a, Instance> {
        Box::pin(self.run(order))
    }

    fn terminate<'a>(&'a self, instance: &'a str) -> Call<'a, ()> {
        Box::pin(async move {
            let sent = self.client().await.terminate_instances().instance_ids(instance).send().await;
            match sent.map_err(convert::error) {
                Ok(_) => Ok(()),
                Err(ProviderError::BadOrder { what }) if what.starts_with("InvalidInstanceID") => Ok(()),
                Err(error) => Err(error),
            }
        })
    }

    fn instances<'a>(&'a self, owner: &'a str) -> Call<'a, Vec<Instance>> {
        Box::pin(self.list(vec![filter(&format!("tag:{OWNER_TAG}"), owner)]))
    }

    /// Interruptions, by the state of the spot requests: the 120 s of the instance's own metadata are the agent's to see. EC2 tells
    /// rebalance hints only there.
    fn notices<'a>(&'a self, owner: &'a str) -> Call<'a, Vec<Notice>> {
        Box::pin(async move {
            let mine = self.instances(owner).await?;
            let spot: Vec<String> = (mine.into_iter())
                .filter(|one| one.tenure == Tenure::Spot && one.state.may_cost())
                .map(|one| one.id)
                .collect();
            let mut notices = Vec::new();
            // EC2 takes 200 values of a filter.
            for some in spot.chunks(200) {
                let filters = vec![Filter::builder().name("instance-id").set_values(Some(some.to_vec())).build()];
                let mut pages = self
                    .client()
                    .await
                    .describe_spot_instance_requests()
                    .set_filters(Some(filters))
                    .into_paginator()
                    .send();
                while let Some(page) = pages.next().await {
                    for request in page.map_err(convert::error)?.spot_instance_requests() {
                        let code = request.status().and_then(|status| status.code()).unwrap_or_default();
                        if let ("marked-for-termination" | "marked-for-stop", Some(instance)) =
                            (code, request.instance_id())
                        {
                            let kind = NoticeKind::Interruption { at_ms: None };
                            notices.push(Notice { instance: instance.to_owned(), kind });
                        }
                    }
                }
            }
            Ok(notices)
        })
    }
}
