// The types of REST `/v1`, as the OpenAPI document has them.
import type { components } from "./schema";

type Schemas = components["schemas"];
export type Cloud = Schemas["Cloud"];
export type Host = Schemas["Host"];
export type Guest = Schemas["Guest"];
export type Operation = Schemas["Operation"];
export type Progress = Schemas["Progress"];
export type Phase = Schemas["Phase"];
export type Plan = Schemas["Plan"];
export type Network = Schemas["Network"];
export type Port = Schemas["Port"];
export type Image = Schemas["Image"];
export type Volume = Schemas["Volume"];
export type Freeze = Schemas["Freeze"];
export type Market = Schemas["Market"];
export type PriceSeries = Schemas["PriceSeries"];
export type Event = Schemas["Event"];
export type Token = Schemas["Token"];
export type TokenSecret = Schemas["TokenSecret"];
export type Project = Schemas["Project"];
export type WhoAmI = Schemas["WhoAmI"];
export type Problem = Schemas["Problem"];
export type Ledger = Schemas["Ledger"];
export type LedgerLine = Schemas["LedgerLine"];
export type Renting = Schemas["Renting"];
export type Role = Schemas["Role"];
