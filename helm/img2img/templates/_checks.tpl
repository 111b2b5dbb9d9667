{{/* Takes where and settings (joined). */}}
{{- define "img2img.checkSettings" -}}
{{- $lease := .settings.lease | default 6 }}
{{- $beat := .settings.beat | default 2 }}
{{- if lt (float64 $lease) (mulf 2 $beat) }}
{{- fail (printf "%s: lease (%v) must be at least twice beat (%v)" .where $lease $beat) }}
{{- end }}
{{- end -}}

{{/* Takes where and env: variables of the user's that would get round the values. */}}
{{- define "img2img.checkEnv" -}}
{{- range .env }}
{{- if hasPrefix "IMG2IMG_" .name }}
{{- fail (printf "%s.extraEnv: %s is a setting of the service: put it into settings, or into the value that it belongs to" $.where .name) }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "img2img.checkGateway" -}}
{{- $gateway := .Values.gateway }}
{{- include "img2img.checkEnv" (dict "where" "gateway" "env" $gateway.extraEnv) }}
{{- $least := include "img2img.gatewayGrace" . | int }}
{{- with $gateway.terminationGracePeriodSeconds }}
{{- if lt (int .) $least }}
{{- fail (printf "gateway.terminationGracePeriodSeconds (%v) is less than preStopSeconds, drainSeconds and 10 more (%d): raise it, or unset it to have that" . $least) }}
{{- end }}
{{- end }}
{{- if gt (int $gateway.autoscaling.minReplicas) (int $gateway.autoscaling.maxReplicas) }}
{{- fail "gateway.autoscaling.minReplicas is more than maxReplicas: lower it" }}
{{- end }}
{{- if and $gateway.autoscaling.enabled (not (dig "requests" "cpu" "" $gateway.resources)) }}
{{- fail "gateway.resources.requests.cpu: the HPA reckons in percent of it: set it, or unset gateway.autoscaling.enabled" }}
{{- end }}
{{- include "img2img.checkSettings" (dict "where" "gateway.settings" "settings" (include "img2img.joined" (list .Values.settings $gateway.settings) | fromYaml)) }}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) }}
{{- fail "httpRoute.parentRefs: name the Gateway that the route belongs to" }}
{{- end }}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) }}
{{- fail "grpcRoute.parentRefs: name the Gateway that the route belongs to" }}
{{- end }}
{{- range $name, $ingress := .Values.ingress }}
{{- if and $ingress.enabled (not $ingress.hosts) }}
{{- fail (printf "ingress.%s.hosts: name a host" $name) }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "img2img.checkPools" -}}
{{- $root := . }}
{{- $seen := dict }}
{{- range (include "img2img.pools" . | fromYaml).pools }}
{{- $where := printf "pool %s" .name }}
{{- if hasKey $seen .name }}
{{- fail (printf "%s is there twice: rename or remove one of them" $where) }}
{{- end }}
{{- $_ := set $seen .name true }}
{{- $given := dict "root" $root "pool" . "where" $where }}
{{- include "img2img.checkEnv" (dict "where" $where "env" .extraEnv) }}
{{- include "img2img.checkModel" $given }}
{{- include "img2img.checkMoney" $given }}
{{- include "img2img.checkScaling" $given }}
{{- include "img2img.checkReckoning" $given }}
{{- include "img2img.checkSettings" (dict "where" (printf "%s: settings" $where) "settings" (include "img2img.workerSettings" $given | fromYaml)) }}
{{- $least := include "img2img.workerGrace" $given | int }}
{{- if and .terminationGracePeriodSeconds (lt (int .terminationGracePeriodSeconds) $least) }}
{{- fail (printf "%s: terminationGracePeriodSeconds (%v) is less than drainSeconds, the lease and 10 more (%d): raise it, or unset it to have that" $where .terminationGracePeriodSeconds $least) }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Gateways reckon what a proxy pool owes with settings of its workers: with others they would want a wrong number. */}}
{{- define "img2img.checkReckoning" -}}
{{- $workers := include "img2img.workerSettings" . | fromYaml }}
{{- $gateways := include "img2img.joined" (list .root.Values.settings .root.Values.gateway.settings) | fromYaml }}
{{- $names := list "upstream_max_concurrency" }}
{{- if not (hasKey .pool "callsPerMinute") }}
{{- $names = concat $names (list "upstream_account_calls" "upstream_token_calls") }}
{{- end }}
{{- if and (eq .pool.kind "proxy") (ne .pool.autoscaling.mode "none") }}
{{- range $names }}
{{- if ne (toString (get $workers .)) (toString (get $gateways .)) }}
{{- fail (printf "%s: settings.%s: gateways reckon with it how many workers are wanted: put it into the chart's settings, for gateways and workers alike" $.where .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Traces that a policy stops are missed by nobody until they are needed. */}}
{{- define "img2img.checkTracing" -}}
{{- $port := regexFind "[0-9]+$" (regexFind ":[0-9]+$" (urlParse .Values.tracing.endpoint).host) }}
{{- $ports := list }}
{{- range .Values.networkPolicy.tracing.ports }}{{ $ports = append $ports (toString .) }}{{ end }}
{{- if and .Values.networkPolicy.enabled $port (not (has $port $ports)) }}
{{- fail (printf "networkPolicy.tracing.ports has not the port of tracing.endpoint (%s): add it, or no trace would get out" $port) }}
{{- end }}
{{- end -}}

{{- define "img2img.checkModel" -}}
{{- $pool := .pool }}
{{- if and $pool.model $pool.weights }}
{{- fail (printf "%s has model and weights: weights say what its model is, leave model out" .where) }}
{{- end }}
{{- if and (has $pool.kind (list "proxy" "fake")) (or $pool.model $pool.weights) }}
{{- fail (printf "%s is of the kind %s, which loads no model: leave model and weights out" .where $pool.kind) }}
{{- end }}
{{- $checker := get (include "img2img.workerSettings" . | fromYaml) "safety_checker" | default "fake" }}
{{- if and (has $pool.kind (list "proxy" "fake")) (ne $checker "fake") }}
{{- fail (printf "%s is of the kind %s, whose image has nothing to run the safety_checker %s with: set that in the settings of the other pools only" .where $pool.kind $checker) }}
{{- end }}
{{- with $pool.weights }}
{{- $sources := 0 }}
{{- range list "claim" "image" "download" }}{{ if hasKey $pool.weights . }}{{ $sources = add1 $sources }}{{ end }}{{ end }}
{{- if ne (int $sources) 1 }}
{{- fail (printf "%s: weights come from one of claim, image and download: give one of them" $.where) }}
{{- end }}
{{- end }}
{{- if and $pool.hub (not (include "img2img.fromHub" .)) }}
{{- fail (printf "%s loads nothing from a hub: leave hub out, or name a hub's model in model" .where) }}
{{- end }}
{{- if and (eq $pool.kind "proxy") (not $pool.upstream) }}
{{- fail (printf "%s calls an upstream: name in upstream.existingSecret the secret with its accounts" .where) }}
{{- end }}
{{- if and (ne $pool.kind "proxy") $pool.upstream }}
{{- fail (printf "%s is of the kind %s, which calls no upstream: leave upstream out" .where $pool.kind) }}
{{- end }}
{{- end -}}

{{- define "img2img.checkMoney" -}}
{{- if and (hasKey .pool "callsPerMinute") (ne .pool.kind "proxy") }}
{{- fail (printf "%s is of the kind %s, which calls no upstream: leave callsPerMinute out" .where .pool.kind) }}
{{- end }}
{{- $priced := or .pool.jobPrice .pool.stepPrice }}
{{- if and $priced (not (hasKey .pool "tenantSpendPerDay")) }}
{{- fail (printf "%s costs money: say with tenantSpendPerDay how much a tenant may spend" .where) }}
{{- end }}
{{- if and (not $priced) (or (hasKey .pool "spendPerDay") (hasKey .pool "tenantSpendPerDay")) }}
{{- fail (printf "%s has a cap and no price: give jobPrice or stepPrice" .where) }}
{{- end }}
{{- end -}}

{{- define "img2img.checkScaling" -}}
{{- $pool := .pool }}
{{- $scaling := $pool.autoscaling }}
{{- $scaler := .root.Values.scaler }}
{{- if ne $scaling.mode "none" }}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) }}
{{- fail (printf "%s: autoscaling.minReplicas is more than maxReplicas: lower it" .where) }}
{{- end }}
{{- if and (eq (int $scaling.minReplicas) 0) (ne $scaling.mode "keda") }}
{{- fail (printf "%s: only keda scales to zero: set autoscaling.minReplicas to 1 or more, or autoscaling.mode to keda" .where) }}
{{- end }}
{{- if and (eq (int $scaling.minReplicas) 0) (not (hasKey $pool "startSeconds")) }}
{{- fail (printf "%s scales to zero: say with startSeconds how long its first worker takes (node, image, model), or it counts as dead after 30 seconds" .where) }}
{{- end }}
{{- if and (eq (int $scaling.minReplicas) 0) .root.Values.gateway.readyNeedsWorkers }}
{{- fail (printf "%s scales to zero, and then no gateway would be ready: set gateway.readyNeedsWorkers to false" .where) }}
{{- end }}
{{- end }}
{{- if and (eq $scaling.mode "keda") (eq $scaling.trigger "external-push") (not (and $scaler.serverSecret $scaler.clientSecret)) }}
{{- fail (printf "%s: external-push needs certificates on both sides: set scaler.serverSecret and scaler.clientSecret, or autoscaling.trigger to metrics-api" .where) }}
{{- end }}
{{- if and (eq $scaling.mode "keda") (eq $scaling.trigger "metrics-api") (not $scaler.operatorSecret) }}
{{- fail (printf "%s: metrics-api needs an operator's key: set scaler.operatorSecret" .where) }}
{{- end }}
{{- $target := .root.Values.poolDefaults.autoscaling.targetSeconds }}
{{- if and (eq $scaling.mode "hpa") (eq $scaling.metric "demand") (ne (toString $scaling.targetSeconds) (toString $target)) }}
{{- fail (printf "%s: the metric of the demand is reckoned with poolDefaults.autoscaling.targetSeconds (%v), not with %v: set it there, or autoscaling.mode to keda" .where $target $scaling.targetSeconds) }}
{{- end }}
{{- if and (eq $scaling.mode "hpa") (eq $scaling.metric "cpu") (not (dig "requests" "cpu" "" $pool.resources)) }}
{{- fail (printf "%s: resources.requests.cpu: the HPA reckons in percent of it: set it, or autoscaling.metric to demand" .where) }}
{{- end }}
{{- if and (eq $scaling.mode "hpa") (eq $scaling.metric "cpu") (ne $pool.kind "cpu") }}
{{- fail (printf "%s: CPU in use says nothing of a pool of the kind %s: set autoscaling.metric to demand" .where $pool.kind) }}
{{- end }}
{{- end -}}

{{- define "img2img.checkRoutes" -}}
{{- $names := list }}
{{- range .Values.pools }}{{ $names = append $names .name }}{{ end }}
{{- $covered := dict "" (list) }}
{{- range $number, $route := .Values.routes }}
{{- range .pools }}
{{- if not (has . $names) }}
{{- fail (printf "route %d names the pool %s, which is none of pools: add or rename it" (add1 $number) .) }}
{{- end }}
{{- end }}
{{- $model := .model | default "" }}
{{- $classes := .classes | default (list "text-to-image" "image-to-image" "inpainting") }}
{{- $_ := set $covered $model (concat (get $covered $model | default list) $classes) }}
{{- end }}
{{- if .Values.routes }}
{{- range $model, $classes := $covered }}
{{- range list "text-to-image" "image-to-image" "inpainting" }}
{{- if not (has . $classes) }}
{{- fail (printf "routes: none %s for %s: add one, or leave its classes out" ($model | empty | ternary "without a model" (printf "for the model %s" $model)) .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}
