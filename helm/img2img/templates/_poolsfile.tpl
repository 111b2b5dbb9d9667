{{/* A field of the pools file, if there is a value; takes name and value. JSON's texts are TOML's, too. */}}
{{- define "img2img.field" -}}
{{- if not (kindIs "invalid" .value) }}
{{ .name }} = {{ if or (kindIs "string" .value) (kindIs "slice" .value) }}{{ toJson .value }}{{ else }}{{ include "img2img.scalar" .value }}{{ end }}
{{- end }}
{{- end -}}

{{/* Takes a pool. */}}
{{- define "img2img.engine" -}}
{{- get (dict "gpu" "diffusion" "cpu" "diffusion" "proxy" "cloudflare" "fake" "fake") .kind -}}
{{- end -}}

{{/* What gateways and workers read (docs/pools.md), as img2img/pools.py has it. */}}
{{- define "img2img.poolsFile" -}}
{{- $root := . -}}
{{- $fields := dict "external" "external" "maxQueued" "max_queued" "maxSteps" "max_steps" "maxPixels" "max_pixels" "startSeconds" "start_seconds" "jobPrice" "job_price" "stepPrice" "step_price" "spendPerDay" "spend_per_day" "tenantSpendPerDay" "tenant_spend_per_day" "callsPerMinute" "calls_per_minute" -}}
{{- $names := list -}}
{{- range (include "img2img.pools" . | fromYaml).pools -}}
{{- $pool := . -}}
{{- $names = append $names .name }}
[[pools]]
name = {{ toJson .name }}
engine = {{ include "img2img.engine" . | toJson }}
{{- with include "img2img.model" (dict "root" $root "pool" .) }}
model = {{ toJson . }}
{{- end }}
{{- range $given, $name := $fields }}
{{- if hasKey $pool $given }}
{{- include "img2img.field" (dict "name" $name "value" (get $pool $given)) }}
{{- end }}
{{- end }}
{{ end }}
{{- range .Values.routes | default (list (dict "pools" $names)) }}
[[routes]]
pools = {{ toJson .pools }}
{{- include "img2img.field" (dict "name" "model" "value" .model) }}
{{- include "img2img.field" (dict "name" "classes" "value" .classes) }}
{{- include "img2img.field" (dict "name" "max_wait" "value" .maxWait) }}
{{ end }}
{{- end -}}
