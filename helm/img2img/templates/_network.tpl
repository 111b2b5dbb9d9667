{{/* What the outside may ask of the HTTP port, below these paths, with commas between: all but /metrics, which needs no key
and tells how much is done and spent here. */}}
{{- define "img2img.publicPaths" -}}
/client/v4,/v1,/schema,/health
{{- end -}}

{{/* Takes ports and to: one rule of egress. */}}
{{- define "img2img.egress" -}}
- ports:
    {{- range .ports }}
    - {port: {{ int . }}, protocol: TCP}
    {{- end }}
  {{- with .to }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{- define "img2img.dnsEgress" -}}
{{- $port := int .Values.networkPolicy.dnsPort }}
- ports: [{port: {{ $port }}, protocol: UDP}, {port: {{ $port }}, protocol: TCP}]
  to:
    {{- toYaml .Values.networkPolicy.dns | nindent 4 }}
{{- end -}}

{{/* Where gateways and workers go: names, the queue server, blobs and traces. */}}
{{- define "img2img.commonEgress" -}}
{{ include "img2img.dnsEgress" . }}
{{- if .Values.valkey.enabled }}
- ports: [{port: 6379, protocol: TCP}]
  to:
    - podSelector:
        matchLabels:
          {{- include "img2img.selector" . | nindent 10 }}
          app.kubernetes.io/component: valkey
{{- else }}
{{ include "img2img.egress" .Values.networkPolicy.redis }}
{{- end }}
{{- if not (or (eq .Values.blobs.url "redis") (hasPrefix "file://" .Values.blobs.url)) }}
{{ include "img2img.egress" .Values.networkPolicy.blobs }}
{{- end }}
{{- if .Values.tracing.endpoint }}
{{ include "img2img.egress" .Values.networkPolicy.tracing }}
{{- end }}
{{- end -}}
