{{/* The release's name, short enough for what is put after it. */}}
{{- define "img2img.fullname" -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- $release := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- .Values.fullnameOverride | default $release | trunc 34 | trimSuffix "-" -}}
{{- end -}}

{{- define "img2img.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "img2img.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* Labels that select every pod of the release. */}}
{{- define "img2img.selector" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Takes root and component. */}}
{{- define "img2img.labels" -}}
{{ include "img2img.selector" .root }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Takes root, component, name and optionally annotations: a whole metadata block. */}}
{{- define "img2img.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "img2img.labels" . | nindent 2 }}
{{- with .annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Takes repository, tag and digest. */}}
{{- define "img2img.image" -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag }}{{- end -}}
{{- end -}}

{{- define "img2img.gatewayImage" -}}
{{- $image := .Values.images.gateway -}}
{{- include "img2img.image" (dict "repository" $image.repository "tag" ($image.tag | default .Chart.AppVersion) "digest" $image.digest) -}}
{{- end -}}

{{/* Takes root and pool. */}}
{{- define "img2img.workerImage" -}}
{{- $image := .root.Values.images.worker -}}
{{- $target := get (dict "gpu" "cuda" "cpu" "cpu" "proxy" "proxy" "fake" "proxy") .pool.kind -}}
{{- $tag := printf "%s-%s" ($image.tag | default .root.Chart.AppVersion) $target -}}
{{- include "img2img.image" (dict "repository" $image.repository "tag" $tag "digest" (get $image.digests $target)) -}}
{{- end -}}

{{/* A number, switch or text as a variable has it: YAML's numbers would come out as 6.7108864e+07. */}}
{{- define "img2img.scalar" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}{{ printf "%.0f" . }}{{- else -}}{{ toString . }}{{- end -}}
{{- end -}}

{{/* Takes a list of maps; of the same key the last one counts, empty and false values, too. */}}
{{- define "img2img.joined" -}}
{{- $all := dict -}}
{{- range . }}{{ range $key, $value := . }}{{ $_ := set $all $key $value }}{{ end }}{{ end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Takes such a list of settings: entries of env. */}}
{{- define "img2img.settings" -}}
{{- range $name, $value := include "img2img.joined" . | fromYaml }}
- name: IMG2IMG_{{ upper $name }}
  value: {{ include "img2img.scalar" $value | quote }}
{{- end }}
{{- end -}}

{{/* The pools with their defaults filled in, under the key "pools". */}}
{{- define "img2img.pools" -}}
{{- $root := . -}}
{{- $pools := list -}}
{{- range .Values.pools -}}
{{- $pool := deepCopy $root.Values.poolDefaults -}}
{{- range $key, $value := . -}}
{{- if has $key (list "autoscaling" "settings" "podLabels" "podAnnotations" "nodeSelector") -}}
{{- $_ := set $pool $key (include "img2img.joined" (list (get $pool $key) $value) | fromYaml) -}}
{{- else -}}
{{- $_ := set $pool $key $value -}}
{{- end -}}
{{- end -}}
{{- $pools = append $pools $pool -}}
{{- end -}}
{{- toYaml (dict "pools" $pools) -}}
{{- end -}}

{{/* Takes root and trigger: "true" if a pool is scaled by KEDA with that trigger. */}}
{{- define "img2img.usesTrigger" -}}
{{- $used := false -}}
{{- range (include "img2img.pools" .root | fromYaml).pools -}}
{{- if and (eq .autoscaling.mode "keda") (eq .autoscaling.trigger $.trigger) }}{{ $used = true }}{{ end -}}
{{- end -}}
{{- if $used }}true{{ end -}}
{{- end -}}

{{/* Takes root and pool. */}}
{{- define "img2img.workerName" -}}
{{ include "img2img.fullname" .root }}-worker-{{ .pool.name }}
{{- end -}}

{{/* Takes root and pool: the model as the pools file names it; empty for the bundled one. */}}
{{- define "img2img.model" -}}
{{- if .pool.weights -}}/models/{{ .pool.weights.path }}{{- else -}}{{ with .pool.model }}{{ . }}{{ end }}{{- end -}}
{{- end -}}

{{/* Takes root and pool: "true" if its model or safety checker is downloaded from a hub. */}}
{{- define "img2img.fromHub" -}}
{{- $checker := get (include "img2img.workerSettings" . | fromYaml) "safety_checker" | default "fake" -}}
{{- if or (and .pool.model (ne .pool.model "emoji-sd")) (and (ne $checker "fake") (not (hasPrefix "/" $checker))) -}}true{{- end -}}
{{- end -}}

{{/* Takes root and pool: the settings that a worker has, joined. */}}
{{- define "img2img.workerSettings" -}}
{{ include "img2img.joined" (list .root.Values.settings .pool.settings) }}
{{- end -}}

{{/* Takes root and pool: how long a worker that is told to stop may take, from the drain, the lease and a margin. */}}
{{- define "img2img.workerGrace" -}}
{{- $lease := get (include "img2img.workerSettings" . | fromYaml) "lease" | default 6 -}}
{{- ceil (addf .pool.drainSeconds $lease 10) | int -}}
{{- end -}}

{{/* Takes root and pool: how long a worker may take until it claims jobs. Its own watchdog allows each of three phases
(import, safety checker, model) IMG2IMG_PHASE_LIMIT, and this a minute more. */}}
{{- define "img2img.workerStart" -}}
{{- $phase := get (include "img2img.workerSettings" . | fromYaml) "phase_limit" | default 600 -}}
{{- addf (mulf 3 $phase) 60 | ceil | int -}}
{{- end -}}

{{- define "img2img.gatewayGrace" -}}
{{- ceil (addf .Values.gateway.preStopSeconds .Values.gateway.drainSeconds 10) | int -}}
{{- end -}}

{{- define "img2img.redisUrl" -}}
- name: IMG2IMG_REDIS_URL
{{- if .Values.valkey.enabled }}
  value: redis://{{ include "img2img.fullname" . }}-valkey:6379/0
{{- else }}
  valueFrom:
    secretKeyRef:
      name: {{ .Values.redis.existingSecret }}
      key: {{ .Values.redis.key }}
{{- end }}
{{- end -}}

{{/* Takes root and component: OpenTelemetry's variables. */}}
{{- define "img2img.tracingEnv" -}}
{{- with .root.Values.tracing }}
{{- if .endpoint }}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: OTEL_RESOURCE_ATTRIBUTES
  value: k8s.namespace.name={{ $.root.Release.Namespace }},k8s.pod.name=$(POD_NAME)
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ .endpoint | quote }}
- name: OTEL_TRACES_SAMPLER
  value: parentbased_traceidratio
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ include "img2img.scalar" .sampleRatio | quote }}
{{- if .headersSecret }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom:
    secretKeyRef:
      name: {{ .headersSecret }}
      key: {{ .headersKey }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Takes root and extra: envFrom, where there is any. */}}
{{- define "img2img.envFrom" -}}
{{- $from := .extra -}}
{{- with .root.Values.blobs.existingSecret }}
{{- $from = prepend $from (dict "secretRef" (dict "name" .)) }}
{{- end }}
{{- with $from -}}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What gateways and workers mount alike. */}}
{{- define "img2img.mounts" -}}
- name: pools
  mountPath: /etc/img2img/pools
  readOnly: true
- name: tmp
  mountPath: /tmp
{{- if .Values.redis.tlsSecret }}
- name: redis-tls
  mountPath: /etc/img2img/redis
  readOnly: true
{{- end }}
{{- if .Values.blobs.existingClaim }}
- name: blobs
  mountPath: {{ trimPrefix "file://" .Values.blobs.url }}
{{- end }}
{{- end -}}

{{/* Takes root and tmpSize. */}}
{{- define "img2img.volumes" -}}
- name: pools
  configMap:
    name: {{ include "img2img.fullname" .root }}-pools
- name: tmp
  emptyDir:
    sizeLimit: {{ .tmpSize }}
{{- with .root.Values.redis.tlsSecret }}
- name: redis-tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- with .root.Values.blobs.existingClaim }}
- name: blobs
  persistentVolumeClaim:
    claimName: {{ . }}
{{- end }}
{{- end -}}
