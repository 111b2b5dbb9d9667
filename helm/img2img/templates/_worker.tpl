{{/* Takes root and pool. The model is in the pools file; so is the engine, but images may have one of their own. */}}
{{- define "img2img.workerEnv" -}}
- {name: IMG2IMG_QUEUE, value: {{ .pool.name | quote }}}
- {name: IMG2IMG_ENGINE, value: {{ include "img2img.engine" .pool }}}
- {name: IMG2IMG_POOLS_FILE, value: /etc/img2img/pools/pools.toml}
{{ include "img2img.redisUrl" .root }}
- {name: IMG2IMG_BLOBS, value: {{ .root.Values.blobs.url | quote }}}
- {name: IMG2IMG_DRAIN_TIMEOUT, value: {{ include "img2img.scalar" .pool.drainSeconds | quote }}}
- {name: IMG2IMG_METRICS_HOST, value: {{ .root.Values.gateway.host | quote }}}
- {name: IMG2IMG_METRICS_PORT, value: "9464"}
{{- with .pool.upstream }}
- {name: IMG2IMG_UPSTREAM_ACCOUNTS_FILE, value: /etc/img2img/upstream/{{ .key | default "accounts.toml" }}}
{{- end }}
{{- include "img2img.settings" (list (dict "log_format" "json") (include "img2img.device" .pool | fromYaml) .root.Values.settings .pool.settings) }}
{{- if not (include "img2img.fromHub" .) }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- else if .pool.hub }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ .pool.hub.existingSecret }}, key: {{ .pool.hub.key | default "token" }}}
{{- end }}
{{- include "img2img.tracingEnv" (dict "root" .root) }}
{{- with .pool.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Takes a pool: the setting that has a worker of the kind gpu use all its GPUs, and never a CPU in their place. */}}
{{- define "img2img.device" -}}
{{- if eq .kind "gpu" -}}
{{- $devices := list -}}
{{- range $number := until (int .gpus) }}{{ $devices = append $devices (printf "cuda:%d" $number) }}{{ end -}}
device: {{ $devices | join "," | default "cuda" | quote }}
{{- end -}}
{{- end -}}

{{/* Takes a pool: its requests and limits, with its GPUs. */}}
{{- define "img2img.workerResources" -}}
{{- $resources := deepCopy .resources -}}
{{- if and (eq .kind "gpu") (gt (int .gpus) 0) -}}
{{- $limits := $resources.limits | default dict -}}
{{- $_ := set $limits .gpuResource (int .gpus) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
